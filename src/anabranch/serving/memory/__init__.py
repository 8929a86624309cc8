"""How a model is served in so much memory: `plan_memory` chooses the bits of its weights, where experts are, and room for keys and values.

form      the weights of a model in one number of bits, and what they take; nothing is read (`forms`)
program   what the processes take before there is a model; measured (`program`)
work      what a step takes beside weights, keys and values (`work`)
plan      the first form of the ladder that fits (`plan`)
"""

from anabranch.serving.memory.plan import MemoryPlan, plan_memory

__all__ = ["MemoryPlan", "plan_memory"]
