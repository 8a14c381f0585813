"""The stand-in for TensorRT-LLM: reading a package's source, and building the stand-in from it.

The source here is written like the original: with checks, descriptions and code around the declarations.
"""

from __future__ import annotations

import json
import sys

import pytest

from lem.backends import tensorrt_source
from tests.tensorrt_standin.build import build
from tests.tensorrt_standin.extract import extract

ARGUMENTS = '''
"""Words about the module."""
import os
from typing import TYPE_CHECKING, Annotated, ClassVar, List, Literal, Optional, TypeAlias, Union

import torch
from pydantic import Field as PydanticField
from pydantic import PositiveInt, PrivateAttr, StrictInt, field_validator
from strenum import StrEnum

from .utils import StrictBaseModel
from ..mapping import CpType

if TYPE_CHECKING:
    from ..elsewhere import Resolved

HOME = os.environ["HOME"]
_UNITS: dict[str, int] = {"KB": 1024}
_Even = Annotated[StrictInt, PydanticField(multiple_of=2, description="no odd ones")]
Sizes: TypeAlias = List[_Even]
Weights = Union[torch.Tensor, str]


def Field(default=..., *, status=None, **kwargs):
    return PydanticField(default, **kwargs)


class Mirror(ABC):
    def mirrored(self):
        return self


class Guide(StrictBaseModel):
    """A class with an enumeration inside."""

    class Kind(Enum):
        FAST = 0
        SLOW = 1

    kind: Kind = Field(default=Kind.FAST, description="which one", status="beta")


class Mode(StrEnum):
    """A mode."""

    PLAIN = "plain"
    """The plain one."""
    ODD = "odd"


class _Shared(StrictBaseModel):
    shared: int = Field(default=3, ge=1)


class _Internal(StrictBaseModel):
    internal: int = 1


@Mirror.mirrors(_Else)
class Cache(_Shared, Mirror):
    DEFAULTS: ClassVar[dict[str, str]] = {Mode.PLAIN: "plain"}

    sizes: List[_Even] = Field(default_factory=list, description="even ones")
    at_most: Annotated[int, Field(gt=0, description="more than nothing")] = 1
    more: Sizes = [2, 4]
    modes: dict[Mode, str] = Field(default_factory=lambda: Cache._made(), description="by a method")
    squares: List[int] = Field(default_factory=lambda: [i * i for i in range(3)])
    mode: "Mode" = Mode.ODD
    other: Optional["Resolved"] = None
    place: CpType = Field(default=CpType.ULYSSES)
    weights: Weights = None
    dtype: torch.dtype = torch.float16
    _seen: Optional["Resolved"] = PrivateAttr(default=None)

    @staticmethod
    def _made():
        return {}

    @field_validator("sizes")
    @classmethod
    def sorted_sizes(cls, sizes):
        return sorted(sizes)


class BaseLlmArgs(StrictBaseModel):
    model: str = Field(description="required")
    name: str = Field(..., description="required as well")
    cache: Cache = Field(default_factory=Cache)
    guide: Optional[Guide] = None


class TorchLlmArgs(BaseLlmArgs):
    steps: PositiveInt = Field(default=1)
    load: Literal["fast", "slow"] = "fast"


LlmArgs = TorchLlmArgs
'''
FILES = {
    "llmapi/llm_args.py": ARGUMENTS,
    # Older versions have it in another file, and as a dataclass.
    "lora_helper.py": """
@dataclass
class LoraConfig(Convertible):
    lora_dir: List[str] = field(default_factory=lambda: [])
    max_lora_rank: int = 64

    def missing(self):
        return []
""",
    "sampling_params.py": """
@dataclass(slots=True, kw_only=True)
class SamplingParams:
    seed: Optional[int] = None
    bad: List[str] = field(default_factory=list)
    _ids: Optional[List[int]] = field(default=None, init=False, repr=False)
""",
    "executor/request.py": """
@dataclass(slots=True)
class LoRARequest:
    lora_name: str
    lora_path: str = ""
""",
    "llmapi/llm.py": """
class BaseLLM:
    def generate_async(self, inputs: Prompt, sampling_params: Optional[Params] = None, *, priority: float = 0.5) -> Out:
        return self.submit(inputs)
""",
    "_torch/pyexecutor/llm_request.py": """
class LlmRequest:
    def __init__(self, **kwargs):
        self.py_min_length = self.sampling_config.min_length
        self.py_slot = None


def converted(executor_request, request):
    # early_stopping is no longer taken out of sampling_config.early_stopping
    size = executor_request.sampling_config.no_repeat_ngram_size
    request.py_no_repeat_ngram_size = size if size else None
    request.py_best_of = executor_request.sampling_config.best_of
""",
    "_torch/pyexecutor/sampler/common.py": '''
def params(request):
    """Of sampling_config.length_penalty nothing is known here, nor of py_best_of."""
    sampling_config = request.sampling_config
    return sampling_config.top_k, request.sampling_config.seed, getattr(request.sampling_config, "min_p", None)
''',
    "_torch/pyexecutor/sampler/sampler.py": """
class TorchSampler:
    def step(self, requests):
        sizes = [getattr(r, "py_no_repeat_ngram_size", None) for r in requests]
        slots = [r.py_slot for r in requests]
        return sizes, slots, any(r.py_min_length for r in requests)
""",
}


@pytest.fixture
def package(tmp_path):
    """Write the source of a package; return its folder."""
    for name, text in FILES.items():
        file = tmp_path / "source/tensorrt_llm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "source/tensorrt_llm"


@pytest.fixture
def arguments(package, tmp_path, monkeypatch):
    """Return the arguments module of the stand-in that is built from that source."""
    declared = json.loads(json.dumps(extract(package, "9")))
    monkeypatch.syspath_prepend(build(tmp_path / "built", declared=declared))
    from tensorrt_llm.llmapi import llm_args

    yield llm_args
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


def test_only_declarations_are_read(package):
    declared = extract(package, "9")
    definitions = {d.get("class") or d["alias"]: d for d in declared["classes"]["llmapi/llm_args.py"]}
    assert list(definitions) == [
        "_Even", "Sizes", "Weights", "Guide", "Mode", "_Shared", "Cache", "BaseLlmArgs", "TorchLlmArgs",
    ]  # fmt: skip
    assert definitions["_Even"]["type"] == "Annotated[StrictInt, PydanticField(multiple_of=2)]"
    inside = {"class": "Kind", "bases": ["Enum"], "members": {"FAST": 0, "SLOW": 1}}
    assert definitions["Guide"] == {
        "class": "Guide",
        "bases": ["StrictBaseModel"],
        "fields": {"kind": ["Kind", "Kind.FAST"]},
        "classes": [inside],
    }
    assert definitions["Cache"]["bases"] == ["_Shared", "Mirror"]
    assert definitions["Cache"]["fields"]["at_most"] == ["Annotated[int, Field(gt=0)]", "1"]
    assert definitions["Cache"]["fields"]["other"] == ["Optional[Resolved]", "None"]
    assert definitions["BaseLlmArgs"]["fields"]["name"] == ["str", None]
    assert declared["calls"] == {"llmapi/llm.py": ["self", "inputs", "sampling_params", "priority"]}
    text = json.dumps(declared)
    assert not [words for words in ("odd ones", "required", "sorted_sizes", "_seen", "by a method") if words in text]


def test_a_source_in_which_something_is_elsewhere_is_not_read_in_part(package):
    (package / "lora_helper.py").rename(package / "lora.py")
    with pytest.raises(LookupError, match=r"no _torch/.*/config.py and no lora_helper.py and no lora_manager.py"):
        extract(package, "9")
    (package / "lora.py").rename(package / "lora_manager.py")
    (package / "llmapi/llm.py").write_text("class LLM:\n    pass\n")
    with pytest.raises(LookupError, match=r"llm.py has no BaseLLM.generate_async"):
        extract(package, "9")


def test_what_is_built_takes_and_refuses_what_the_source_does(arguments):
    cache = arguments.Cache()
    assert (cache.sizes, cache.more, cache.squares, cache.mode.value) == ([], [2, 4], [0, 1, 4], "odd")
    assert (cache.shared, cache.modes, cache.place, cache.dtype) == (3, None, None, None)
    assert arguments.Guide().kind is arguments.Guide.Kind.FAST
    assert arguments.Cache(place="anything", weights=7, dtype=3).place == "anything"
    assert arguments.TorchLlmArgs(model="m", name="n", guide={"kind": 1}).guide.kind is arguments.Guide.Kind.SLOW
    for wrong in ({"sizes": [3]}, {"sizes": ["2"]}, {"more": [1]}, {"at_most": 0}, {"mode": "even"}, {"page": 1}):
        with pytest.raises(ValueError, match=f"1 validation error for Cache\n{next(iter(wrong))}"):
            arguments.Cache(**wrong)
    with pytest.raises(ValueError, match=r"2 validation errors for Guide"):
        arguments.Guide(kind=2, kinds=1)


def test_other_classes_are_built_as_well(arguments):
    from tensorrt_llm.executor.request import LoRARequest
    from tensorrt_llm.lora_helper import LoraConfig
    from tensorrt_llm.sampling_params import SamplingParams

    assert LoRARequest("adapter").lora_path == ""
    assert (LoraConfig().lora_dir, LoraConfig(max_lora_rank=8).max_lora_rank) == ([], 8)
    assert SamplingParams().bad == []


def test_sampling_options_are_read_however_the_sampler_comes_by_them(package):
    assert tensorrt_source.sampling_options_in_config(package) == {"top_k", "seed", "min_p"}
    # py_best_of is assigned, but no sampler reads it; py_slot is read, but is not an option.
    assert tensorrt_source.sampling_options_kept(package) == {"min_length", "no_repeat_ngram_size"}


def test_what_a_version_ignores_is_not_read(package, tmp_path, monkeypatch):
    declared = extract(package, "9")
    assert tensorrt_source.sampling_options_kept(build(tmp_path / "all", declared=declared) / "tensorrt_llm") == {
        "min_length", "no_repeat_ngram_size",
    }  # fmt: skip
    less = build(tmp_path / "less", declared=declared, ignore=("no_repeat_ngram_size", "seed"))
    monkeypatch.syspath_prepend(less)
    assert tensorrt_source.sampling_options_read() == {"top_k", "min_p", "min_length"}
    single = less / "tensorrt_llm/_torch/pyexecutor"
    (single / "sampler/sampler.py").rename(single / "sampler.py")
    tensorrt_source._attributes.cache_clear()
    assert tensorrt_source.sampling_options_read() == {"top_k", "min_p", "min_length"}
