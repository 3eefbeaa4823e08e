"""Text by a tokenizer.model: the package's own ids, nothing but text out of a string, exact round trips."""

import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from text_json import SAMPLE
from text_pieces import THINK, trained

import omni_tokenizers
from omni_tokenizers.errors import OmniError
from omni_tokenizers.text_pieces import PieceTextTokenizer
from omni_tokenizers.text_public import public_text


@pytest.fixture(scope="module")
def tokenizer() -> PieceTextTokenizer:
    return PieceTextTokenizer(trained())


def test_ids_are_those_of_the_package(tokenizer):
    """Many scripts, code and emoji become the ids that the package gives, and come back as they were."""
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained())
    for text in SAMPLE:
        codes = tokenizer.encode(text)
        assert codes.dtype == np.int32
        assert tokenizer.ids[codes].tolist() == theirs.encode(text)
        assert tokenizer.decode(codes) == text


def test_special_tokens_are_never_typed(tokenizer):
    """The name of a control token in a text is letters; a symbol that is text is itself."""
    assert not {0, 1, 2} & set(tokenizer.ids.tolist()) and tokenizer.vocabulary_size == 397
    for name in ("<unk>", "<s>", "</s>", "<0x41>"):
        codes = tokenizer.encode(f"a{name}b")
        assert len(codes) > 3 and tokenizer.decode(codes) == f"a{name}b"
    assert len(tokenizer.encode(THINK)) == 2  # and the space before a text


def test_pieces_that_are_no_text_to_a_model_are_refused(tokenizer):
    """A symbol that the model's vocabulary does not count as text, and characters that there are no pieces for."""
    think = tokenizer.ids[tokenizer.encode(THINK)[-1]]
    less = PieceTextTokenizer(trained(), np.setdiff1d(tokenizer.ids, [think]))
    with pytest.raises(OmniError, match="the piece '<think>', which is no text to the model"):
        less.encode(f"a {THINK}")
    with pytest.raises(OmniError, match="the piece '<unk>'"):
        PieceTextTokenizer(trained(120, byte_fallback=False)).encode("你好")


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    """This package's directory and the public file give the same codes; other ids are another tokenizer."""
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "public").mkdir()
    tokenizer.write_original(tmp_path / "public")
    assert (tmp_path / "public" / "tokenizer.model").read_bytes() == trained()
    for again in (omni_tokenizers.load(tmp_path / "saved"), public_text(tmp_path / "public")):
        assert isinstance(again, PieceTextTokenizer) and again.hash == tokenizer.hash
        for text in SAMPLE:
            np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
    assert PieceTextTokenizer(trained(), tokenizer.ids[1:]).hash != tokenizer.hash


def test_any_codes_decode(tokenizer):
    """Half characters read as U+FFFD, codes that are none as nothing."""
    codes = tokenizer.encode("🙂")
    assert "\ufffd" in tokenizer.decode(codes[:2])
    assert tokenizer.decode([-1, 10**6]) == ""


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 50, trained()[:1000], trained()[:-9] + b"\xff" * 9])
def test_other_files_are_refused_by_name(tmp_path, content):
    """One line that names the file."""
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(OmniError, match="not a SentencePiece model") as caught:
        public_text(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_made_to_crash_is_one_line(tmp_path):
    """A piece of megabytes, which ended the process in the package's earlier versions, does so no more."""

    def field(content: bytes) -> bytes:
        """The first field of a protobuf message: what it is, its length in groups of seven bits, lowest first."""
        groups = [len(content) >> 7 * place & 0x7F for place in range(4)]
        return bytes([0x0A, *(group | 0x80 for group in groups[:-1]), groups[-1]]) + content

    (tmp_path / "tokenizer.model").write_bytes(trained() + field(field(b"a" * 4_000_000)))
    program = (
        "import sys\nfrom omni_tokenizers.text_public import OmniError, public_text\n"
        "try: print(len(public_text(sys.argv[1]).encode('ab' * 99)))\n"
        "except OmniError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr


def test_strings_alone_are_text(tokenizer):
    """Bytes and lone surrogates are refused."""
    for wrong in (b"a", "\ud800"):
        with pytest.raises(OmniError, match=r"must be a string|not valid Unicode"):
            tokenizer.encode(wrong)
