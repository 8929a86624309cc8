"""PVChat: personalised video chat from one reference, with routed heads.

    from anabranch.heads.pvchat import Learning, learn, pretrain, read_drawing, read_drawings

A model answers questions about clips of drawn subjects; from one drawing, or one clip, it learns to know a new subject and to say whether
it is in a clip, what it looks like, does, and where it is.

"PVChat: Personalized Video Chat with One-Shot Learning", 2025, arXiv 2503.17069.
"""

from anabranch.heads.pvchat.clips import Actor, Clip, Composer, fitted, read_clip, write_clip
from anabranch.heads.pvchat.cut_out import Seen, cut_out, read_reference
from anabranch.heads.pvchat.drawings import Portrait, Subject, portraits, read_drawing, read_drawings
from anabranch.heads.pvchat.generators import Composed, Embedder, Generator, InkEmbedder, Warped, nearest
from anabranch.heads.pvchat.learn import Learned, Learning, Pretraining, exam, learn, pretrain
from anabranch.heads.pvchat.measure import KindScore, Score, measure
from anabranch.heads.pvchat.model import PVChat
from anabranch.heads.pvchat.one_shot import Balance, OneShotSet, Part, Row, ask_all, look_alikes
from anabranch.heads.pvchat.training import ClipTask, Questions, Rates, rows_learning
from anabranch.heads.pvchat.trials import Trial, Ways, odds, read_trials, ways
from anabranch.heads.pvchat.vocabulary import Vocabulary

__all__ = [
    "Actor",
    "Balance",
    "Clip",
    "ClipTask",
    "Composed",
    "Composer",
    "Embedder",
    "Generator",
    "InkEmbedder",
    "KindScore",
    "Learned",
    "Learning",
    "OneShotSet",
    "PVChat",
    "Part",
    "Portrait",
    "Pretraining",
    "Questions",
    "Rates",
    "Row",
    "Score",
    "Seen",
    "Subject",
    "Trial",
    "Vocabulary",
    "Warped",
    "Ways",
    "ask_all",
    "cut_out",
    "exam",
    "fitted",
    "learn",
    "look_alikes",
    "measure",
    "nearest",
    "odds",
    "portraits",
    "pretrain",
    "read_clip",
    "read_drawing",
    "read_drawings",
    "read_reference",
    "read_trials",
    "rows_learning",
    "ways",
    "write_clip",
]
