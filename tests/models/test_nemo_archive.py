"""`.nemo` archives: read in memory, and what is not to be trusted refused; written so that NeMo can read them."""

import gzip
import io
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.checkpoint import CheckpointError, read_plain
from models.nemo import CONFIG, WEIGHTS, read_nemo, write_nemo

MODEL = {"sample_rate": 16000, "encoder": {"att_context_size": [-1, -1], "feat_out": -1, "scale": 1e-6, "name": None}}
STATE = OrderedDict(
    {
        "encoder.out.weight": torch.arange(6.0).reshape(2, 3) / 7,
        "quantizer.codebooks": torch.linspace(0, 1, 5, dtype=torch.float64),
        "encoder.batch_norm.num_batches_tracked": torch.tensor(3),
        "preprocessor.half": torch.tensor([1.5, float("nan"), -0.0], dtype=torch.bfloat16),
    }
)


def saved(content) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    return actual.dtype == expected.dtype and saved(actual) == saved(expected)


def archive(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def of_type(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


GOOD = [(f"./{CONFIG}", b"sample_rate: 16000\n"), (f"./{WEIGHTS}", saved(STATE))]


def refusal(path: Path) -> str:
    """What a user reads, without the file that it must begin with."""
    with pytest.raises(CheckpointError) as raised:
        read_nemo(path)
    line = str(raised.value)
    assert line.startswith(f"{path}: ") and "\n" not in line
    return line.removeprefix(f"{path}: ")


# Round trip


def test_what_is_written_is_read_bit_for_bit(tmp_path):
    write_nemo(tmp_path / "new" / "x.nemo", MODEL, STATE)
    content = read_plain(tmp_path / "new" / "x.nemo")
    assert content["model_config"] == MODEL
    assert list(content["state_dict"]) == list(STATE)
    assert all(same_bits(content["state_dict"][name], STATE[name]) for name in STATE)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["x.nemo"]


def test_the_archive_is_as_nemo_writes_it(tmp_path):
    """Names, order, no compression, a state dict that is an OrderedDict, YAML without anchors."""
    shared = [-1, -1]
    write_nemo(tmp_path / "x.nemo", {"left": shared, "right": shared}, STATE)
    with tarfile.open(tmp_path / "x.nemo", "r:") as tar:
        assert tar.getnames() == [f"./{CONFIG}", f"./{WEIGHTS}"]
        text, weights = (tar.extractfile(member).read() for member in tar)
    assert text.decode() == "left:\n- -1\n- -1\nright:\n- -1\n- -1\n"
    assert isinstance(torch.load(io.BytesIO(weights), weights_only=True), OrderedDict)


def test_the_same_content_gives_the_same_bytes(tmp_path):
    trained = {name: tensor.clone().requires_grad_(tensor.is_floating_point()) for name, tensor in STATE.items()}
    write_nemo(tmp_path / "a.nemo", MODEL, STATE)
    write_nemo(tmp_path / "b.nemo", MODEL, trained)
    assert (tmp_path / "a.nemo").read_bytes() == (tmp_path / "b.nemo").read_bytes()


def test_a_failed_write_leaves_the_old_archive(tmp_path, monkeypatch):
    write_nemo(tmp_path / "x.nemo", MODEL, STATE)
    before = (tmp_path / "x.nemo").read_bytes()
    monkeypatch.setattr(tarfile.TarFile, "addfile", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_nemo(tmp_path / "x.nemo", {}, {})
    assert (tmp_path / "x.nemo").read_bytes() == before


# What is read


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_old_and_new_archives(tmp_path, mode, prefix):
    """Through gzip or not, with or without ./, among other members, whatever the file is called."""
    members = [(of_type("./", tarfile.DIRTYPE), b""), ("./vocab.txt", b"a b"), *GOOD]
    renamed = [(name.removeprefix("./") if isinstance(name, str) else name, content) for name, content in members]
    path = archive(tmp_path / "x.ckpt", members if prefix else renamed, mode)
    content = read_plain(path)
    assert content["model_config"] == {"sample_rate": 16000}
    assert same_bits(content["state_dict"]["quantizer.codebooks"], STATE["quantizer.codebooks"])


# What is refused


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ("../escaped.txt", "climbs out of the archive"),
        ("./a/../../escaped.txt", "climbs out of the archive"),
        ("..\\escaped.txt", "climbs out of the archive"),
        (of_type("../folder", tarfile.DIRTYPE), "climbs out of the archive"),
        ("/absolute.txt", "has an absolute path"),
        ("C:\\absolute.txt", "has an absolute path"),
        ("\\absolute.txt", "has an absolute path"),
        (f"../{CONFIG}", "climbs out of the archive"),
        (f"/{WEIGHTS}", "has an absolute path"),
        (of_type("./link", tarfile.SYMTYPE, "/etc"), "is a link to /etc"),
        (of_type("./link", tarfile.SYMTYPE, "vocab.txt"), "is a link to vocab.txt"),
        (of_type("./hard", tarfile.LNKTYPE, "/etc/passwd"), "is a link to /etc/passwd"),
        (of_type(WEIGHTS, tarfile.SYMTYPE, "/etc/passwd"), "is a link to /etc/passwd"),
        (of_type("./device", tarfile.CHRTYPE), "is neither a file nor a folder"),
        (of_type(f"./{CONFIG}", tarfile.FIFOTYPE), "is neither a file nor a folder"),
        (of_type("./holes", tarfile.GNUTYPE_SPARSE), "is neither a file nor a folder"),
    ],
)
@pytest.mark.parametrize("place", [0, 2])
def test_members_that_lead_elsewhere(tmp_path, monkeypatch, mode, member, reason, place):
    """Also where the two that count are there: no such archive was made by NeMo. Nothing is written anywhere."""
    folder = tmp_path / "inner"
    folder.mkdir()
    monkeypatch.chdir(folder)
    name = member if isinstance(member, str) else member.name
    members = [*GOOD[:place], (member, b""), *GOOD[place:]]
    assert refusal(archive(folder / "x.nemo", members, mode)) == f"refused, its member {name} {reason}"
    assert [path.name for path in tmp_path.rglob("*")] == ["inner", "x.nemo"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], f"not a .nemo archive (no {CONFIG} and no {WEIGHTS} in it)"),
        (GOOD[:1], f"not a .nemo archive (no {WEIGHTS} in it)"),
        (GOOD[1:], f"not a .nemo archive (no {CONFIG} in it)"),
        ([*GOOD, GOOD[0]], f"holds {CONFIG} twice"),
        ([(of_type(f"./{CONFIG}", tarfile.DIRTYPE), b""), GOOD[1]], f"{CONFIG} in it is not an ordinary file"),
    ],
)
def test_members(tmp_path, members, message):
    assert refusal(archive(tmp_path / "x.nemo", members)) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"- 1\n- 2\n", f"{CONFIG} in it holds no mapping of keys to values"),
        (b"", f"{CONFIG} in it holds no mapping of keys to values"),
        (b"a: [1, 2", f"{CONFIG} in it is no YAML of plain values (while parsing"),
        (b"a: \xff\xfe", f"{CONFIG} in it is no YAML of plain values ("),
        (b"a: 2001-99-99", f"{CONFIG} in it is no YAML of plain values (month must be in 1..12)"),
        (b"[" * 400, f"{CONFIG} in it is no YAML of plain values (maximum recursion"),
        (b"a: !!python/object/apply:os.system ['touch ran']", f"{CONFIG} in it is no YAML of plain values (could not"),
        (b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", f"{CONFIG} in it is no YAML of plain values (an alias"),
        (b"a: " + b"x" * (1 << 20), f"{CONFIG} in it is longer than 1048576 bytes"),
    ],
)
def test_configurations(tmp_path, in_tmp, text, message):
    assert refusal(archive(tmp_path / "x.nemo", [(CONFIG, text), GOOD[1]])).startswith(message)
    assert not Path("ran").exists()


class Runs:
    """What a pickle would do when it is trusted."""

    def __reduce__(self):
        return open, ("ran", "w")


def deflated(content: bytes) -> bytes:
    """The same archive of torch, its records compressed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (saved({"weight": Runs()}), "refused, it holds more than plain data ("),
        (pickle.dumps(Runs()), "refused, it holds more than plain data ("),
        (saved([1.0]), "holds a list, not a checkpoint or a state dict"),
        (saved(STATE)[:-100], "damaged or not a checkpoint ("),
        (b"no weights", "refused, it holds more than plain data ("),
        (deflated(saved(torch.zeros(1 << 20))), "refused, its records would unpack to more than the file holds"),
    ],
)
def test_weights(tmp_path, in_tmp, weights, message):
    assert refusal(archive(tmp_path / "x.nemo", [GOOD[0], (WEIGHTS, weights)])).startswith(f"{WEIGHTS}: {message}")
    assert not Path("ran").exists()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_archives_cut_short(tmp_path, mode):
    content = archive(tmp_path / "x.nemo", GOOD, mode).read_bytes()
    for share in (0.05, 0.15, 0.3):
        (tmp_path / "x.nemo").write_bytes(content[: int(share * len(content))])
        assert "not a .nemo archive (" in refusal(tmp_path / "x.nemo")


def test_numbers_in_a_header_that_no_file_has(tmp_path):
    """A size of 2^95 - 1 bytes."""
    content = bytearray(archive(tmp_path / "x.nemo", GOOD).read_bytes())
    content[124:136] = b"\x80" + b"\x7f" + b"\xff" * 10
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    (tmp_path / "x.nemo").write_bytes(content)
    assert refusal(tmp_path / "x.nemo").startswith("damaged or not a .nemo archive (")


def test_a_gzip_file_that_unpacks_to_far_more(tmp_path, monkeypatch):
    monkeypatch.setattr("models.nemo._ALWAYS_UNPACKED_BYTES", 1 << 16)
    path = archive(tmp_path / "x.nemo", [("./zeros", bytes(1 << 20)), *GOOD], "w:gz")
    assert refusal(path) == f"refused, it unpacks to more than {max(1 << 16, 20 * path.stat().st_size)} bytes"


def test_a_sparse_member(tmp_path):
    """A terabyte of holes in a small file."""
    info = tarfile.TarInfo(CONFIG)
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 40)}
    members = [(info, b"1\n0\n1\n".ljust(512, b"\0") + b"a"), GOOD[1]]
    assert (
        refusal(archive(tmp_path / "x.nemo", members)) == f"refused, its member {CONFIG} is neither a file nor a folder"
    )


def test_files_of_another_kind(tmp_path):
    assert refusal(tmp_path / "none.nemo") == "no such checkpoint file"
    (tmp_path / "x.nemo").write_bytes(gzip.compress(b"no tar file"))
    assert refusal(tmp_path / "x.nemo").startswith("damaged or not a .nemo archive (")
    torch.save({"a": torch.zeros(1)}, tmp_path / "y.nemo")
    assert refusal(tmp_path / "y.nemo").startswith("damaged or not a .nemo archive (")
    assert torch.equal(read_plain(tmp_path / "y.nemo")["a"], torch.zeros(1))  # by content, not by name
