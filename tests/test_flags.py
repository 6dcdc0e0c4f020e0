"""Settings changed from the command line."""

from dataclasses import replace

import pytest

from offload.errors import UsageError
from quant.flags import with_changes
from quant.settings import AwqSettings, GptqSettings

NAMES = "damping, sequential, propagation, scale, "
NAMES += "search.scale_points, search.clip_points, search.clip_floor, search.clip_damping, search.search_samples, "
NAMES += "learn.steps, learn.size, learn.samples, pass_dtype"


def test_a_setting_is_changed_by_its_name() -> None:
    changed = with_changes(GptqSettings(), ["propagation=1", "scale=true", "search.clip_points=3", "damping=0.5"])
    expected = GptqSettings(damping=0.5, propagation=1.0, scale=True, search=replace(AwqSettings(), clip_points=3))
    assert changed == expected
    assert type(changed.propagation) is float
    assert with_changes(None, []) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("clip_points=3", f"--set 'clip_points=3': expected NAME=VALUE with a NAME of {NAMES}"),
        ("scale=1", "--set 'scale=1': expected a value like false"),
        ("damping=low", "--set 'damping=low': expected a value like 0.1"),
        ("search.clip_points=2.5", "--set 'search.clip_points=2.5': expected a value like 12"),
        ("damping", "--set 'damping': expected a value like 0.1"),
        (
            'pass_dtype="float16"',
            "--set 'pass_dtype=\"float16\"': pass_dtype='float16': expected one of auto, float32, bfloat16",
        ),
    ],
)
def test_what_is_no_setting_is_refused(change: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        with_changes(GptqSettings(), [change])
    assert str(refused.value) == message
