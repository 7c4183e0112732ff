"""The acceptance rule: walk the draft tree with the verifier's own picks.

At the root the verifier picks its next token. If a child carries that token the walk moves there;
if not, the pick is the bonus token and the step ends. Every pick is emitted, and no probability
of the drafter enters, so the text is the one that token-by-token decoding gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recurrent_drafting.draft_tree import DraftTree
from recurrent_drafting.sampling import Sampler


@dataclass(frozen=True)
class Acceptance:
    """What one verifier step yields, per row.

    Args:
        paths: accepted nodes from the root on, so the accepted length is ``len(path) - 1``.
        tokens: the verifier's picks in order; the last one is the bonus token, the next root.
    """

    paths: list[list[int]]
    tokens: list[list[int]]


def walk(tree: DraftTree, logits: Tensor, sampler: Sampler) -> Acceptance:
    """Descend while the verifier's pick is a child of the current node.

    Picks are committed to the sampler one by one, so penalties and noise at a node derive from
    the node's own path.

    Drafted are 5 and 6, and 7 and 8 after the 5; the verifier picks 5 at the root, 8 at node 1 and 2 at node 4:

    >>> from recurrent_drafting import SamplingConfig
    >>> from recurrent_drafting.draft_tree import Beams
    >>> zeros = torch.zeros(1, 2, 2)
    >>> beams = Beams(torch.tensor([[[5, 6], [7, 8]]]), zeros.long(), zeros)
    >>> logits = torch.eye(9)[torch.tensor([[5, 8, 0, 0, 2]])]
    >>> sampler = Sampler(SamplingConfig(), [[4]], [0], eos_token_ids=[], vocab_size=9, device=logits.device)
    >>> walk(DraftTree.from_beams(torch.tensor([4]), beams), logits, sampler)
    Acceptance(paths=[[0, 1, 4]], tokens=[[5, 8, 2]])

    Args:
        tree: the verified trees, B rows of N nodes.
        logits: verifier logits at each node, ``[B, N, V]``.
        sampler: holds each row's text so far, ending with the root token.

    Returns:
        Paths and tokens per row.

    Raises:
        NumericsError: the logits of a visited node are not finite.
    """
    batch = logits.shape[0]
    paths: list[list[int]] = [[0] for _ in range(batch)]
    tokens: list[list[int]] = [[] for _ in range(batch)]
    active = list(range(batch))
    while active:
        rows = torch.tensor(active, device=logits.device)
        nodes = torch.tensor([paths[row][-1] for row in active], device=logits.device)
        picks = sampler.pick(logits[rows, nodes], active).tolist()
        moved = []
        for row, token in zip(active, picks, strict=True):
            sampler.commit(row, token)
            tokens[row].append(token)
            if child := tree.child(row, paths[row][-1], token):
                paths[row].append(child)
                moved.append(row)
        active = moved
    return Acceptance(paths=paths, tokens=tokens)
