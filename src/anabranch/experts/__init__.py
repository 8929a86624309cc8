"""Systems that route tokens to experts. One module per paper."""

from anabranch.extras import require

require("lm", by=__name__)
