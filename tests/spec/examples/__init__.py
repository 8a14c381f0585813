"""Examples of every rule, by family; the rules in `lem.spec.rules` are in the same order."""

from tests.spec.examples import campaigns, files, machine, openai, options, pytorch, simulated, tensorrt, vllm

EXAMPLES = [
    each
    for family in (options, campaigns, machine, files, pytorch, simulated, vllm, tensorrt, openai)
    for each in family.EXAMPLES
]
