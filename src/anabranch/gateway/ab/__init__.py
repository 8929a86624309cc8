"""A/B tests of two strategies on a split of keys.

assignment  which strategy a request goes to        sequential  a test that may be looked at at any time
results     both arms, from the store
"""

from anabranch.gateway.ab.assignment import Arm, arm_of
from anabranch.gateway.ab.results import ABResult, ArmResult, results_of, results_of_store

__all__ = ["ABResult", "Arm", "ArmResult", "arm_of", "results_of", "results_of_store"]
