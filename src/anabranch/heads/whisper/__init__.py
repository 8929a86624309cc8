"""Routed heads of a Whisper: speech as a second modality. Commands: ``anabranch heads train WHISPER SPEECH``, ``heads report``,
``heads transcribe``.

folder.py        models: as transformers or CTranslate2 (`ctranslate2.py`) saves them, or with routed heads
sound.py         files of speech, and what Whisper hears of them
wav.py           their headers and samples
writing.py       what it writes of sound, also of long sound
task.py          how the heads learn, and what is measured
"""

from anabranch.heads.whisper.folder import Words, is_whisper, open_whisper, save_whisper
from anabranch.heads.whisper.sound import Utterance, read_sound, read_speech
from anabranch.heads.whisper.task import CROSS, Speech, SpeechTask, measure
from anabranch.heads.whisper.writing import Piece, transcribe, transcribe_sound

__all__ = [
    "CROSS",
    "Piece",
    "Speech",
    "SpeechTask",
    "Utterance",
    "Words",
    "is_whisper",
    "measure",
    "open_whisper",
    "read_sound",
    "read_speech",
    "save_whisper",
    "transcribe",
    "transcribe_sound",
]
