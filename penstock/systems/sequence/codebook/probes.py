"""What a model has learnt of a finite state machine, where it keeps the state, and what writing a code does.

Shape legend: N states of the machine, D digits a state, B walks, S whole states of a walk, C codes, K chosen codes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.data.fsm import StateMachine
from penstock.nn.code_reading import find_codebooks, force_codes, record_codes
from penstock.nn.codebook import CodebookKey
from penstock.systems.sequence.codebook.model import CodebookLM
from penstock.systems.sequence.codebook.reading import code_as_classifier, code_purity

#: Walks that an intervention is tried on, and random codes that each forced one is compared with.
_WALKS, _RANDOM = 256, 5


@torch.no_grad()
def transition_mass(model: CodebookLM, machine: StateMachine) -> float:
    """Probability that the state after a first one is a valid one, mean over all first states (Codebook Features, sec. 4).

    The probability of a state is the product of those of its digits.
    """
    size, digits = machine.num_states, machine.num_digits
    mass = 0.0
    for state in range(size):
        pairs_N2 = torch.stack([torch.full((size,), state), torch.arange(size)], 1)
        tokens = machine.write(pairs_N2)
        log_p = model(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None])[:, digits:, 0].sum(-1)
        mass += float(log_p.exp()[machine.edges_NN[state]].sum())
    return mass / size


@torch.no_grad()
def sample(model: CodebookLM, start_BL: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Go on with ``number`` tokens drawn at temperature one: (B, L) -> (B, L + number)."""
    tokens, cache, step = start_BL, model.new_cache(), start_BL
    for _ in range(number):
        step = torch.multinomial(model(step, cache=cache)[:, -1].softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, step], 1)
    return tokens


def sampled_transitions(model: CodebookLM, machine: StateMachine, window: int, seed: int) -> dict[str, float]:
    """Share of transitions in sampled walks that are edges of the machine: all, and the first ones."""
    start = torch.full((_WALKS, 1), machine.start)
    valid = machine.valid(machine.read(sample(model, start, window, torch.Generator().manual_seed(seed))))
    return {
        "transition_accuracy": float(valid.float().mean()),
        "first_transition_accuracy": float(valid[:, 0].float().mean()),
    }


@dataclass(frozen=True)
class StateCodes:
    """Which codes fire at the last digit of each state.

    Attributes:
        key: of the codebook.
        states: (M,) the state at each of M places of the walks.
        ids: (M, K) the codes there.
        counts: (N, C) how often the first code of each state was which.
    """

    key: CodebookKey
    states: Tensor
    ids: Tensor
    counts: Tensor

    @property
    def modal(self) -> Tensor:
        """The usual code of each state, (N,)."""
        return self.counts.argmax(1)

    def summary(self) -> dict[str, float]:
        """Agreement of states with their usual codes, and how far these tell the states apart."""
        modal = self.modal
        tests = [code_as_classifier(self.ids, int(code), self.states == n) for n, code in enumerate(modal)]
        return {
            "modal_agreement": float((self.counts.amax(1) / self.counts.sum(1)).mean()),
            "distinct_modal": len(modal.unique()) / len(modal),
            "code_precision": sum(precision for precision, _ in tests) / len(tests),
            "code_recall": sum(recall for _, recall in tests) / len(tests),
        }


def whole_states(tokens_BL: Tensor, machine: StateMachine) -> Tensor:
    """Walks cut after the last state that the first L - 1 tokens hold whole: what a model of window L - 1 has seen."""
    return tokens_BL[:, : 1 + (tokens_BL.shape[1] - 2) // machine.num_digits * machine.num_digits]


@torch.no_grad()
def codes_of_states(model: CodebookLM, machine: StateMachine, tokens_BL: Tensor) -> StateCodes:
    """The codes that the model's last codebook lets through at the last digit of every state.

    Args:
        model: with codebooks.
        machine: that the walks are of.
        tokens_BL: walks, cut by `whole_states`.
    """
    key = list(find_codebooks(model))[-1]
    with record_codes(model) as log:
        model(tokens_BL)
    ids_MK = log[key][0][:, machine.num_digits :: machine.num_digits].flatten(0, 1)
    states_M = machine.read(tokens_BL).flatten()
    counts = torch.zeros(machine.num_states, find_codebooks(model)[key].num_codes)
    counts.index_put_((states_M, ids_MK[:, 0]), torch.ones(len(states_M)), accumulate=True)
    return StateCodes(key, states_M, ids_MK, counts)


@torch.no_grad()
def purity_of_states(model: CodebookLM, machine: StateMachine) -> float:
    """Share of the last codebook's codes that fire after one first state only (purity on bigrams for two digits)."""
    with record_codes(model) as log:
        model(machine.write(torch.arange(machine.num_states)[:, None]))
    return code_purity(list(log.values())[-1][0][:, -1])


@torch.no_grad()
def forcing(
    model: CodebookLM, machine: StateMachine, tokens_BL: Tensor, codes: StateCodes, seed: int
) -> dict[str, float]:
    """Force a state's usual code at the end of walks that end in other states.

    Args:
        model: with codebooks.
        machine: that the walks are of.
        tokens_BL: walks, cut by `whole_states`.
        codes: from `codes_of_states`.
        seed: of the random codes.

    Returns:
        the probability of first digits that are valid after the forced state b: as it is, with b's code forced, with
        random other codes in use forced, and the difference of these two; and the Jensen-Shannon divergence (nats) of
        the next digit's distribution from its mean in walks that do end in b, unforced and forced.
    """
    tokens_BL = tokens_BL[:_WALKS]
    last_B = machine.read(tokens_BL)[:, -1]
    used = codes.ids[:, 0].unique()
    draw = torch.Generator().manual_seed(seed)
    plain_BV = _next(model, tokens_BL)
    sums: dict[str, list[float]] = {}
    for state in range(machine.num_states):
        other = last_B != state
        code = int(codes.modal[state])
        choices = used[used != code]
        if not len(choices) or bool(other.all()):
            continue
        valid = machine.digits_ND[machine.next_NE[state], 0].unique()
        target_V = plain_BV[~other].mean(0)
        forced_BV = _forced(model, tokens_BL[other], codes.key, [code])
        picks = choices[torch.randint(len(choices), (_RANDOM,), generator=draw)].tolist()
        random_BV = _forced(model, tokens_BL[other], codes.key, picks)
        for name, p_BV in (("unforced", plain_BV[other]), ("forced", forced_BV), ("random", random_BV)):
            sums.setdefault(f"{name}_mass", []).append(float(p_BV[:, valid].sum(-1).mean()))
            sums.setdefault(f"{name}_js", []).append(float(jensen_shannon(p_BV, target_V).mean()))
    measured = {name: sum(values) / len(values) for name, values in sums.items()}
    if measured:
        measured["forced_minus_random"] = measured["forced_mass"] - measured["random_mass"]
    return measured


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions over the last axis, nats: (..., V), (..., V) -> (...)."""
    mean = (p + q) / 2
    entropies = [torch.special.entr(one).sum(-1) for one in (mean, p, q)]
    return entropies[0] - (entropies[1] + entropies[2]) / 2


def _next(model: CodebookLM, tokens_BL: Tensor) -> Tensor:
    return model(tokens_BL)[:, -1].softmax(-1)


def _forced(model: CodebookLM, tokens_BL: Tensor, key: CodebookKey, codes: Sequence[int]) -> Tensor:
    """The next token's distribution with each of the codes forced at the last position, one after the other."""
    found = []
    for code in codes:
        with force_codes(model, [(*key, code, -1)]):
            found.append(_next(model, tokens_BL))
    return torch.cat(found)
