"""Loads `.env`, but ignores variables through which a `.env` in a downloaded folder could run code.

Variables that are already set take precedence. This module does not know what the variables mean to lem.
"""

from __future__ import annotations

import logging
import os
import re
import sys

from lem.errors import ConfigError
from lem.quantities import one_line

log = logging.getLogger(__name__)

# Python's own variables that cannot load code.
OF_PYTHON = frozenset(
    f"PYTHON{name}"
    for name in (
        "UNBUFFERED", "HASHSEED", "IOENCODING", "UTF8", "DONTWRITEBYTECODE", "FAULTHANDLER", "SAFEPATH", "NOUSERSITE",
        "DEVMODE", "TRACEMALLOC", "MALLOC", "NODEBUGRANGES", "INTMAXSTRDIGITS", "COERCECLOCALE",
    )
)  # fmt: skip
# Variables that make a program load or run code, or that tell it where to look for code, settings or consents.
LOADERS = re.compile(
    "|".join(
        (
            # the dynamic linker and the C library
            r"LD_\w+", r"DYLD_\w+", r"_RLD\w*", r"GCONV_PATH", r"GLIBC_TUNABLES", r"LOCPATH", r"NLSPATH",
            # where programs, settings and recorded consents are found
            r"PATH", r"HOME", r"SHELL", r"XDG_\w+", r"LEM_STATE_DIR",
            # shells
            r"BASH_ENV", r"BASH_FUNC_.*", r"BASHOPTS", r"SHELLOPTS", r"ENV", r"ZDOTDIR", r"FPATH", r"PS[0-4]",
            r"PROMPT_COMMAND", r"IFS", r"CDPATH",
            # interpreters
            r"PYTHON\w*", r"IPYTHONDIR", r"JUPYTER_\w+", r"PERL\w*", r"RUBY(OPT|LIB)", r"GEM_(HOME|PATH)",
            r"NODE_(OPTIONS|PATH)", r"LUA_(C?PATH|INIT)\w*", r"PHPRC", r"R_(PROFILE|LIBS|ENVIRON)\w*", r"JULIA_\w+",
            r"_?JAVA_(TOOL_)?OPTIONS", r"JDK_JAVA_OPTIONS", r"CLASSPATH",
            # programs that other programs start
            r"EDITOR", r"VISUAL", r"PAGER", r"BROWSER", r"LESS(OPEN|CLOSE)", r"GIT_\w+", r"SSH_ASKPASS", r"PIP_\w+",
            r"UV_\w+", r"CC", r"CXX", r"CPP", r"LD", r"NVCC\w*", r"CUDACXX", r"CUDAHOSTCXX", r"\w*FLAGS",
            r"CMAKE_\w+", r"\w+_COMPILER_LAUNCHER",
            # libraries with plugins, hooks and caches of compiled code
            r"OPENSSL_\w+", r"SASL_PATH", r"KRB5_CONFIG", r"CURL_HOME", r"CUDA_(HOME|PATH|CACHE_PATH)",
            r"\w+_INJECTION(32|64)_PATH", r"NCCL_\w*PLUGIN\w*", r"NCCL_CONF_FILE", r"UCX_MODULE_DIR", r"OMPI_MCA_\w+",
            r"PMIX_MCA_\w+", r"FI_PROVIDER_PATH", r"OMP_TOOL_LIBRARIES", r"OCL_ICD\w*", r"VK_\w+", r"HSA_TOOLS_LIB",
            r"TORCHINDUCTOR_\w*(DIR|PATH)", r"TORCH_EXTENSIONS_DIR", r"TRITON_\w*(DIR|PATH|HOME)", r"NUMBA_CACHE_DIR",
            r"CUPY_CACHE_DIR", r"FLASHINFER_\w*(DIR|PATH|BASE)", r"VLLM_(CACHE|CONFIG)_ROOT", r"VLLM_\w*PLUGIN\w*",
            r"HF_MODULES_CACHE", r"MPLBACKEND", r"MPLCONFIGDIR", r"HDF5_PLUGIN_PATH", r"GDAL_DRIVER_PATH",
            r"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", r"VLLM_LOGGING_CONFIG_PATH", r"VLLM_ALLOW_INSECURE_SERIALIZATION",
            r"\w+_SO_PATH", r"\w*LIBRARY_PATH", r"\w+_(MCA|HOOK)(_\w+)?", r"\w*PLUGIN\w*", r"OPAL_\w+",
            r"(\w+_)?(DG|TVM|TVM_FFI|TILELANG|CUTE_DSL|DEEP_GEMM)_\w*(DIR|PATH|COMPILER)", r"\w*KERNELS\w*",
            r"QT_PLUGIN_PATH", r"GTK_(PATH|MODULES)", r"GIO_(EXTRA_MODULES|MODULE_DIR)", r"GST_PLUGIN\w*",
        )
    ),
    re.IGNORECASE,
)  # fmt: skip


def loads_code(name: str) -> bool:
    """Return whether a variable can make processes load code, or change where they look for code or saved consents."""
    return LOADERS.fullmatch(name) is not None and name not in OF_PYTHON


def load_dotenv() -> None:
    """Set the variables that the nearest `.env` defines, but keep the values of variables that are already set.

    A variable that could run code, or whose value contains a null character, is ignored with a warning.
    """
    import dotenv

    file = dotenv.find_dotenv(usecwd=True)
    log.debug(".env: %s", file or "none")
    if not file:
        return
    try:
        values = dotenv.dotenv_values(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: the file cannot be read ({error}); correct or remove it.") from None
    new = {name: value for name, value in values.items() if value is not None and name not in os.environ}
    for name in new:
        if loads_code(name):
            _warn(
                file,
                f"{name} is ignored because it can affect which code is run; if you need it, set it in the shell.",
            )
        elif "\0" in new[name]:
            _warn(file, f"{name} is ignored because its value contains a null character.")
        else:
            os.environ[name] = new[name]


def _warn(file: str, text: str) -> None:
    print(one_line(f"Warning: {file}: {text}"), file=sys.stderr)
