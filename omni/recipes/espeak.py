"""Spoken words and sentences from espeak-ng, loaded with ctypes from the PyPI package espeakng-loader.

espeak-ng is GPL: it comes with the extra `quickstart` only, and nothing but recipes imports this file. It is
also one per process, keeps hidden state from one utterance to the next, and takes its noise from the clock and from C's
`rand`. So it runs in a child process of its own, where the same list of utterances always gives the same samples and
where a crash is an error message.
"""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import BinaryIO

import numpy as np
import soxr

from omni_tokenizers.errors import OmniError

SAMPLE_RATE = 22050
LONGEST_TEXT = 500
PEAK = 0.9
AUDIBLE = 0.02  # of the peak: what is quieter at the ends counts as silence

# speak_lib.h of espeak-ng 1.52
_SYNCHRONOUS, _DO_NOT_EXIT, _CHARACTERS_UTF8 = 2, 0x8000, 1
_RATE, _PITCH = 1, 3
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class Utterance:
    """One thing to say."""

    text: str
    """At most 500 characters."""
    voice: str
    """accent+variant, such as en-us+m3."""
    rate: int = 175
    """Words a minute, 80 to 450."""
    pitch: int = 50
    """0 to 99."""


def variants() -> list[str]:
    """The names of espeak-ng's voice variants, sorted: each is a voice with an accent in front (en-us+m3)."""
    return sorted(os.listdir(os.path.join(_loader().get_data_path(), "voices", "!v")))


def speak(utterances: Iterable[Utterance]) -> Iterator[np.ndarray]:
    """Yields each utterance, float32 mono [samples] at 22050 Hz in [-1, 1] with the silence at its ends.

    The samples are a pure function of the whole list.

    Raises:
      OmniError: an utterance out of range, an unknown voice, the package is missing, espeak-ng dies.
    """
    utterances = list(utterances)
    for utterance in utterances:
        _check(utterance)
    _loader()
    command = [sys.executable, "-m", "omni.recipes.espeak"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as messages,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=messages, env=environment) as child,
    ):
        try:
            with contextlib.suppress(BrokenPipeError):  # a child that has died already is reported at its first answer
                child.stdin.write(json.dumps([astuple(utterance) for utterance in utterances]).encode())
                child.stdin.close()
            for utterance in utterances:
                samples = _receive(child.stdout)
                if samples is None:
                    child.wait()
                    messages.seek(0)
                    reason = messages.read().decode(errors="replace").strip().splitlines()
                    raise OmniError(f"espeak-ng stopped at {utterance}: {reason[-1] if reason else child.returncode}")
                yield samples
        finally:
            child.kill()


def trimmed(samples: np.ndarray, utterance: Utterance, sample_rate: int) -> np.ndarray:
    """What `speak` gave as int16 at another rate, all but 5 ms of the silence at both ends cut off, at a peak of 0.9.

    Raises:
      OmniError: there is nothing but silence.
    """
    if np.abs(samples).max(initial=0) < 0.01:
        raise OmniError(f"espeak-ng said nothing for {utterance}")
    clip = soxr.resample(samples, SAMPLE_RATE, sample_rate)
    clip /= np.abs(clip).max()
    audible = np.flatnonzero(np.abs(clip) > AUDIBLE)
    margin = sample_rate // 200
    clip = clip[max(audible[0] - margin, 0) : audible[-1] + margin]
    return np.rint(clip * (PEAK * 32767)).astype(np.int16)


def _receive(stream: BinaryIO) -> np.ndarray | None:
    """The samples of one utterance, None where the stream ends early."""
    header = stream.read(4)
    size = 2 * int.from_bytes(header, "little")
    body = stream.read(size)
    if len(header) < 4 or len(body) < size:
        return None
    return np.frombuffer(body, "<i2").astype(np.float32) / 32768


def _check(utterance: Utterance) -> None:
    if not 0 < len(utterance.text) <= LONGEST_TEXT or "\0" in utterance.text:
        raise OmniError(f"espeak-ng takes 1 to {LONGEST_TEXT} characters at a time, not {utterance.text[:40]!r}")
    if not (80 <= utterance.rate <= 450 and 0 <= utterance.pitch <= 99):
        raise OmniError(f"{utterance}: the rate must be 80 to 450 and the pitch 0 to 99")
    if not 0 < len(utterance.voice) <= 39 or "\0" in utterance.voice:  # espeak-ng copies the name into 40 bytes
        raise OmniError(f"{utterance}: no such espeak-ng voice")


def _loader():
    try:
        import espeakng_loader
    except ImportError as error:
        raise OmniError(
            "speech needs the package espeakng-loader: pip install 'omni-any-to-any[quickstart]'"
        ) from error
    return espeakng_loader


def _serve() -> None:
    """The child: reads the list from stdin; writes each utterance's number of samples (uint32) and samples (int16)."""
    utterances = [Utterance(*values) for values in json.load(sys.stdin)]
    output = sys.stdout.buffer
    library = ctypes.CDLL(_loader().get_library_path())
    # espeak-ng cuts a path longer than 160 bytes: from its own directory the path is short.
    os.chdir(os.path.dirname(_loader().get_data_path()))
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, b".", _DO_NOT_EXIT)
    if rate != SAMPLE_RATE:
        sys.exit(f"espeak-ng did not start: it answered {rate} where its sample rate, {SAMPLE_RATE}, was expected")
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))
    ctypes.CDLL(None).srand(1)

    chunks = []

    @_CALLBACK
    def receive(samples, count, events):
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    library.espeak_SetSynthCallback(receive)
    for utterance in utterances:
        chunks.clear()
        if library.espeak_SetVoiceByName(utterance.voice.encode()) != 0:
            sys.exit(f"espeak-ng has no voice {utterance.voice!r}")
        library.espeak_SetParameter(_RATE, utterance.rate, 0)
        library.espeak_SetParameter(_PITCH, utterance.pitch, 0)
        text = utterance.text.encode() + b"\0"
        library.espeak_Synth(text, ctypes.c_size_t(len(text)), 0, 1, 0, _CHARACTERS_UTF8, None, None)
        library.espeak_Synchronize()
        samples = b"".join(chunks)
        output.write((len(samples) // 2).to_bytes(4, "little") + samples)
    output.flush()


if __name__ == "__main__":
    _serve()
