"""Which microphone belongs to which far end; never one to itself, never two to one."""

from pathlib import Path

import pytest

from data.errors import ManifestError
from data.manifest import write_manifest
from launch.errors import ConfigError
from launch.pairs import pair_inputs

KINDS = {"mic": "audio", "far": "audio"}


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def pairs(input: str, far: str | None, output: str = "out") -> dict[str, tuple[str, str | None]]:
    """Output name -> files, as they were found."""
    here = Path.cwd()

    def name(path: Path) -> str:
        return (path.relative_to(here) if path.is_absolute() else path).as_posix()

    jobs = pair_inputs(KINDS, {"input": input, "far": far, "output": output}, outputs=["enhanced"])
    return {key: tuple(s and name(s.path) for s in (job["mic"], job["far"])) for key, job in jobs.items()}


def refused(input: str, far: str | None, error: type[Exception] = ConfigError) -> list[str]:
    with pytest.raises(error) as raised:
        pairs(input, far)
    return str(raised.value).splitlines()


def test_two_folders_are_paired_by_name_without_the_endings(in_tmp: Path) -> None:
    touch("mics/a_mic.wav", "mics/b.wav", "mics/deep/c_mic.flac", "mics/d_mic_mic.wav")
    touch("loopback/a_lpb.wav", "loopback/b_farend.wav", "loopback/c.wav", "loopback/d_mic_lpb.wav")
    assert pairs("mics/", "loopback/") == {
        "a": ("mics/a_mic.wav", "loopback/a_lpb.wav"),
        "b": ("mics/b.wav", "loopback/b_farend.wav"),
        "deep/c": ("mics/deep/c_mic.flac", "loopback/c.wav"),
        "d_mic": ("mics/d_mic_mic.wav", "loopback/d_mic_lpb.wav"),
    }
    assert pairs("mics/*.wav", "loopback/[abd]*").keys() == {"a", "b", "d_mic"}


def test_one_folder_with_both_is_paired_by_role(in_tmp: Path) -> None:
    touch("rec/x_mic.wav", "rec/x_lpb.wav", "rec/y.wav", "rec/y_farend.wav", "rec/out/x_enhanced.wav")
    expected = {"x": ("rec/x_mic.wav", "rec/x_lpb.wav"), "y": ("rec/y.wav", "rec/y_farend.wav")}
    assert pairs("rec/", "rec/", "rec/out") == expected
    assert pairs("rec/*.wav", "rec", "rec/out") == expected
    touch("rec/x_clean.wav")
    line, hint = refused("rec/*", "rec/*")
    assert line == "rec/x_clean.wav: no far file for it in rec/*", "it is not its own far end"
    assert "input='folder/*_mic.wav' far='folder/*_lpb.wav'" in hint
    assert pairs("rec/*_mic.wav", "rec/*_lpb.wav") == {"x": expected["x"]}


def test_the_place_counts_where_a_name_is_not_enough(in_tmp: Path) -> None:
    touch("mics/anna/1.wav", "mics/ben/1.wav", "far/anna/1_lpb.wav", "far/ben/1_lpb.wav")
    expected = {f"{who}/1": (f"mics/{who}/1.wav", f"far/{who}/1_lpb.wav") for who in ("anna", "ben")}
    assert pairs("mics", "far") == expected and pairs("mics/*/*.wav", "far/*/*.wav") == expected
    touch("far/cleo/1_lpb.wav")
    assert refused("mics", "far") == ["far/cleo/1_lpb.wav: no mic file for it in mics"]


def test_without_a_partner_or_with_several(in_tmp: Path) -> None:
    touch("mics/a_mic.wav", "mics/b_mic.wav", "far/b_lpb.wav", "far/c_lpb.wav")
    assert refused("mics", "far") == [
        "mics/a_mic.wav: no far file for it in far",
        "far/c_lpb.wav: no mic file for it in mics",
    ]
    touch("far/a_lpb.wav", "far/a_farend.wav", "mics/c.wav")
    assert refused("mics", "far") == ["a: several far files for it: far/a_farend.wav, far/a_lpb.wav"]
    touch(*(f"mics/m{number:02}.wav" for number in range(30)))
    lines = refused("mics", "far")
    assert len(lines) == 11 and lines[-1] == "and 21 more"
    touch("lpb/z_lpb.wav", "lpb/y_lpb.wav")
    assert refused("lpb", "lpb")[1] == "lpb/z_lpb.wav: no mic file for it in lpb"


def test_two_typed_files_belong_together(in_tmp: Path) -> None:
    touch("call.wav", "played_by_the_phone.wav", "folder/call.wav", "folder/other.wav")
    assert pairs("call.wav", "played_by_the_phone.wav") == {"call": ("call.wav", "played_by_the_phone.wav")}
    assert pairs("call.wav", "folder/call.wav") == {"call": ("call.wav", "folder/call.wav")}
    assert refused("call.wav", "folder") == ["folder/other.wav: no mic file for it in call.wav"]


def test_no_far_end_at_all(in_tmp: Path) -> None:
    touch("rec/x_mic.wav", "rec/x_lpb.wav", "rec/y.wav")
    assert pairs("rec", "none") == {"x": ("rec/x_mic.wav", None), "y": ("rec/y.wav", None)}
    (line,) = refused("rec", None)
    assert "set far=…" in line and "far=none" in line
    touch("rec/y.flac")
    assert pairs("rec", "none").keys() == {"x", "y_wav", "y_flac"}
    Path("rec/y.flac").unlink()
    touch("none/x.wav", "none/y.wav")
    assert pairs("rec", "./none")["x"] == ("rec/x_mic.wav", "none/x.wav")
    with pytest.raises(ConfigError, match="none: no array file there"):  # only sound can be silent
        pair_inputs({"mic": "audio", "far": "array"}, {"input": "rec", "far": "none", "output": "o"}, outputs=[])


def echo_rows(*names: str, **more: object) -> list[dict]:
    return [{"mic_filepath": f"mics/{n}_mic.wav", "farend_filepath": f"far/{n}.wav", **more} for n in names]


def test_a_manifest_names_both(in_tmp: Path) -> None:
    near = {"mic_filepath": "mics/b_mic.wav", "kind": "real near-end single talk"}
    write_manifest("m.jsonl", [*echo_rows("a", "deep/c"), near, *echo_rows("a")])
    assert pairs("m.jsonl", None) == {
        "a": ("mics/a_mic.wav", "far/a.wav"),
        "deep/c": ("mics/deep/c_mic.wav", "far/deep/c.wav"),
        "b": ("mics/b_mic.wav", None),
    }
    assert set(pairs("m.jsonl", "none").values()) == {(f"mics/{n}_mic.wav", None) for n in ("a", "b", "deep/c")}
    touch("loopback/a_lpb.wav", "loopback/b_lpb.wav", "loopback/c_lpb.wav")
    assert pairs("m.jsonl", "loopback")["deep/c"] == ("mics/deep/c_mic.wav", "loopback/c_lpb.wav")
    write_manifest("both.jsonl", echo_rows("a", "d"))
    assert pairs("both.jsonl", "both.jsonl") == pairs("both.jsonl", None), "typed twice, it says the same"


def test_parts_of_recordings(in_tmp: Path) -> None:
    parts = [echo_rows("a", offset=start, duration=2.0)[0] for start in (0.5, 4.0)]
    write_manifest("m.jsonl", parts)
    jobs = pair_inputs(KINDS, {"input": "m.jsonl", "far": None, "output": "out"}, outputs=["enhanced"])
    assert list(jobs) == ["a_0.5s", "a_4s"]
    for start, job in zip((0.5, 4.0), jobs.values(), strict=True):
        assert {(source.offset_s, source.duration_s) for source in job.values()} == {(start, 2.0)}
    assert pairs("m.jsonl", "none").keys() == jobs.keys()


@pytest.mark.parametrize(
    ("row", "error", "says"),
    [
        ({"mic_filepath": "x.wav"}, ManifestError, "m.jsonl, line 2: key 'farend_filepath' is missing"),
        ({"audio_filepath": "x.wav"}, ManifestError, "m.jsonl, line 2: key 'mic_filepath' is missing"),
        ({"mic_filepath": "mics/a_mic.wav", "farend_filepath": "x.wav"}, ConfigError, "line 2: would be written as a,"),
    ],
)
def test_a_row_that_cannot_be_used(in_tmp: Path, row: dict, error: type[Exception], says: str) -> None:
    write_manifest("m.jsonl", [*echo_rows("a"), row])
    (line,) = refused("m.jsonl", None, error)
    assert says in line


def test_a_manifest_of_single_recordings_still_needs_the_far_end(in_tmp: Path) -> None:
    write_manifest("m.jsonl", [{"audio_filepath": "mics/a_mic.wav"}])
    assert "set far=…" in refused("m.jsonl", None)[0]
    touch("far/a_lpb.wav")
    assert pairs("m.jsonl", "far") == {"a": ("mics/a_mic.wav", "far/a_lpb.wav")}
