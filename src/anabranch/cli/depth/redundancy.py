"""``anabranch depth redundancy``: how little blocks change the tokens that go through them."""

from anabranch.cli.depth.prune import AFTER
from anabranch.cli.depth.shared import Context, Data, Limit, Source, one_of, questions_of, stack_at
from anabranch.cli.graph.waiting import waiting
from anabranch.cli.options import AsJson, Device, Dtype, Model, Quiet
from anabranch.cli.output import fact, print_json, table
from anabranch.extras import require


def redundancy(
    model: Model,
    source: Source = None,
    data: Data = None,
    limit: Limit = None,
    context: Context = 64,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Print the cosine between input and output of each block: the mean, and the shares of tokens above 0.5, 0.8, 0.9, 0.95 and 0.99.

    Skipping tokens costs least in blocks with a cosine near 1.
    """
    require("lm", by="anabranch depth redundancy")
    import torch

    from anabranch.depth.ftp import redundancy_report

    text = one_of(source, data)
    stack, tokenizer = stack_at(model, dtype, device)
    questions, name = questions_of(model, stack, tokenizer, text, context=context, after=AFTER, limit=limit)
    with waiting("measuring", quiet):
        found = redundancy_report(stack, (torch.tensor([[*one.prompt, *one.answer]]) for one in questions))
    if as_json:
        print_json({"model": model, "data": name, **found.to_dict()})
        return
    fact("model", f"{model}   {stack.num_blocks} blocks")
    fact("data", f"{name}   {found.tokens:,} tokens")
    rows = [
        [str(block), f"{mean:.4f}", *(f"{share:.1%}" for share in shares)]
        for block, (mean, shares) in enumerate(zip(found.mean, found.share, strict=True))
    ]
    rows.append(["all", f"{sum(found.mean) / len(found.mean):.4f}", *(f"{share:.1%}" for share in found.overall)])
    table(["block", "mean cos", *(f"> {limit:g}" for limit in found.thresholds)], rows)
