"""Systems that decide how much depth or work a token gets. One module, or folder, per paper, over what they share.

`stack_of` gives the blocks of a pretrained model, ours or transformers'; `run_path` runs some of them, in another order; `DepthRouter` has
routers choose them.
"""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.depth.decisions import EXECUTE, REPEAT, SKIP, check_depth_path, decisions_of, path_of
from anabranch.depth.report import DepthReport
from anabranch.depth.routed import RoutedPass, routed_pass
from anabranch.depth.router import DepthRouter
from anabranch.depth.stack import BlockStack, run_path, stack_of

__all__ = [
    "EXECUTE",
    "REPEAT",
    "SKIP",
    "BlockStack",
    "DepthReport",
    "DepthRouter",
    "RoutedPass",
    "check_depth_path",
    "decisions_of",
    "path_of",
    "routed_pass",
    "run_path",
    "stack_of",
]
