"""Reading codes: what each stands for, how many are in use, whether one is the detector of a concept.

Shape legend: B batch, L length, K chosen codes, N inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from penstock.gates import Table
from penstock.nn.code_reading import find_codebooks, record_codes
from penstock.nn.codebook import CodebookKey


@torch.no_grad()
def code_table(
    model: nn.Module,
    batches: Tensor | Iterable[Tensor],
    *,
    decode: Callable[[list[int]], str] | None = None,
    top: int = 5,
    contexts: int = 3,
    context: int = 8,
) -> Table:
    """What each code stands for: the tokens at which it fires most, and some of the contexts.

    Args:
        model: a language model with codebooks, called with tokens (B, L).
        batches: tokens (B, L) int64, or several.
        decode: from token ids to text (default: the numbers).
        top: how many tokens are named.
        contexts: how many contexts are shown, the first ones met.
        context: tokens a context has, the last one being where the code fired.

    Returns:
        a row for each code that fired: layer, place, head, code, count (tokens), share (of all tokens), tokens (with
        the share of the code's firings), contexts; most used first within a codebook.
    """
    text = decode or (lambda ids: " ".join(map(str, ids)))
    seen: dict[CodebookKey, dict[int, Counter[int]]] = {}
    where: dict[tuple[CodebookKey, int], list[list[int]]] = {}
    total = 0
    for tokens_BL in [batches] if isinstance(batches, Tensor) else batches:
        with record_codes(model) as log:
            model(tokens_BL)
        total += tokens_BL.numel()
        rows = tokens_BL.tolist()
        for key, (ids_BLK,) in log.items():
            codes = seen.setdefault(key, {})
            for row, place, rank in (ids_BLK >= 0).nonzero().tolist():
                code = int(ids_BLK[row, place, rank])
                codes.setdefault(code, Counter())[rows[row][place]] += 1
                examples = where.setdefault((key, code), [])
                if len(examples) < contexts:
                    examples.append(rows[row][max(place + 1 - context, 0) : place + 1])
    table = Table()
    for key, codes in seen.items():
        for code, tokens in sorted(codes.items(), key=lambda one: -one[1].total()):
            count = tokens.total()
            common = ", ".join(f"{text([t])!r} {n / count:.0%}" for t, n in tokens.most_common(top))
            examples_text = " | ".join(text(ids) for ids in where[key, code])
            table.append(
                {
                    **key._asdict(),
                    "code": code,
                    "count": count,
                    "share": count / total,
                    "tokens": common,
                    "contexts": examples_text,
                }
            )
    return table


def codebook_table(model: nn.Module) -> Table:
    """The metrics of every codebook since they were reset: one row each."""
    return Table(
        {
            **key._asdict(),
            "codes": layer.num_codes,
            "active": layer.metrics.active_codes,
            "dead": layer.metrics.dead_share,
            "mse": layer.metrics.mse,
            "input norm": layer.metrics.input_norm,
            "output norm": layer.metrics.output_norm,
        }
        for key, layer in find_codebooks(model).items()
    )


def code_purity(ids_NK: Tensor) -> float:
    """Share of the codes fired at all that fired on exactly one of N distinct inputs (bigrams, trigrams, ...).

    Args:
        ids_NK: the codes of each input, -1 for none.
    """
    fired = Counter(code for row in ids_NK.tolist() for code in set(row) if code >= 0)
    return sum(n == 1 for n in fired.values()) / max(len(fired), 1)


def code_as_classifier(ids_NK: Tensor, code: int, concept_N: Tensor) -> tuple[float, float]:
    """Precision and recall of "the code fires" as a classifier of a concept.

    Args:
        ids_NK: the codes of each of N tokens.
        code: which.
        concept_N: boolean, where the concept is present.

    Returns:
        precision (NaN if the code never fires) and recall (NaN if the concept is never present).
    """
    fires_N = (ids_NK == code).any(-1)
    both = (fires_N & concept_N).sum()
    return float(both / fires_N.sum()), float(both / concept_N.sum())
