from __future__ import annotations

import pytest

from lem.errors import ResultsError
from lem.studies.manifest import FILE, read_manifest


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ('[{"config_file": null, "directory": null, "log": null}]', "is damaged: an entry has no 'label'."),
        ("[", "cannot be read: Expecting value"),
        ('{"a": 1}', "cannot be read: "),
        (None, "cannot be read: No such file or directory."),
    ],
)
def test_a_damaged_manifest_says_what_is_wrong(tmp_path, content, error):
    if content is not None:
        (tmp_path / FILE).write_text(content)
    with pytest.raises(ResultsError) as caught:
        read_manifest(tmp_path, "")
    (problem,) = caught.value.problems
    assert problem.startswith(f"{tmp_path / FILE} {error}")
    assert "Errno" not in problem
