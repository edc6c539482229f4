"""What torch itself accepts is the reference: its parser runs without a GPU."""

import pytest
import torch

from vramplan.errors import SpecError
from vramplan.spec.alloc_conf import UNLIMITED, AllocConf
from vramplan.units import MIB

GOOD = [
    "",
    "expandable_segments:True",
    "expandable_segments: False , max_split_size_mb:64",
    "max_split_size_mb:20",
    "max_split_size_mb:99999999999999",
    "large_segment_size_mb:40",
    "max_non_split_rounding_mb:21",
    "roundup_power2_divisions:1",
    "roundup_power2_divisions:16",
    "roundup_power2_divisions:[256:1,512:2,1024:4,>:8]",
    "roundup_power2_divisions:[64:8,>:0],garbage_collection_threshold:0.8",
    "pinned_use_background_threads:True",
]
BAD = [
    "expandable_segments:true",
    "max_split_size_mb:19",
    "max_split_size_mb:x",
    "large_segment_size_mb:10",
    "max_non_split_rounding_mb:10",
    "roundup_power2_divisions:0",
    "roundup_power2_divisions:3",
    "roundup_power2_divisions:[3:4]",
    "roundup_power2_divisions:[4:3]",
    "garbage_collection_threshold:0",
    "garbage_collection_threshold:1.2",
]


@pytest.fixture(autouse=True)
def torchs_defaults():
    reset = "max_split_size_mb:99999999999999,roundup_power2_divisions:1,large_segment_size_mb:20"
    torch._C._accelerator_setAllocatorSettings(reset)
    yield
    torch._C._accelerator_setAllocatorSettings(reset)


@pytest.mark.parametrize("text", GOOD)
def test_what_torch_accepts_is_read(text):
    torch._C._accelerator_setAllocatorSettings(text)
    AllocConf.parse(text)


@pytest.mark.parametrize("text", BAD)
def test_what_torch_refuses_is_an_error_that_names_the_setting(text):
    with pytest.raises((ValueError, RuntimeError)):
        torch._C._accelerator_setAllocatorSettings(text)
    with pytest.raises(SpecError, match=f"alloc_conf: {text.partition(':')[0]}"):
        AllocConf.parse(text)


def test_an_unknown_setting_is_an_error_that_names_the_known_ones():
    with pytest.raises(SpecError, match="'expandable_segment' is not known here; known are expandable_segments"):
        AllocConf.parse("expandable_segment:True")


def test_values():
    conf = AllocConf.parse("expandable_segments:True,max_split_size_mb:128,garbage_collection_threshold:0.6")
    assert (conf.expandable_segments, conf.max_split_bytes, conf.garbage_collection_threshold) == (True, 128 * MIB, 0.6)
    assert AllocConf.parse("max_split_size_mb:99999999999999").max_split_bytes == UNLIMITED
    assert AllocConf.parse("backend:native") == AllocConf()


def test_a_list_of_divisions_holds_from_its_sizes_on():
    """c10/core/AllocatorConfig.cpp, parseRoundUpPower2Divisions."""
    conf = AllocConf.parse("roundup_power2_divisions:[64:8,256:4,>:2]")
    sizes = (1, 63, 64, 127, 128, 255, 256, 511, 512, 2**20)
    # the first value also holds below it; 128 is not named; the last named is overwritten by what is above it
    assert [conf.divisions_for(size * MIB) for size in sizes] == [8, 8, 8, 8, 0, 0, 2, 2, 2, 2]
