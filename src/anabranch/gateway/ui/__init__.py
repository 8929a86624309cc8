"""The page at ``/ui``: what a gateway is doing, rendered on the server, with one small script and nothing from elsewhere.

snapshot  the facts of one moment          charts  SVG of them
page      HTML of them                     page.css, page.js  as they are
frame     what all pages share             ab, label  pages of A/B tests and of pairs to judge
"""

from anabranch.gateway.ui.page import render
from anabranch.gateway.ui.snapshot import DeploymentFact, Point, Seen, Snapshot, Spend

__all__ = ["DeploymentFact", "Point", "Seen", "Snapshot", "Spend", "render"]
