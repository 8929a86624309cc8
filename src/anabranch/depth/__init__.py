"""Systems that decide how much depth or work a token gets. One module per paper."""

from anabranch.extras import require

require("lm", by=__name__)
