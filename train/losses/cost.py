"""The losses of reward and cost models. Pure functions on end scores; every loss is per pair, (B,), before reduction.

Source: Dai et al., "Safe RLHF", 2310.12773, section 3.2 (the losses L_R and L_C) and their appendix (the penalty mu on
the scores' size). The same as the sequence-wise losses of PKU's safe-rlhf, which also adds the terms unweighted,
takes s from the answers' own labels and penalises both end scores by mu = 0.001 times their squares. Different here: a
pair may weigh more or less than one (`CategoryTerms`), a pair may have no order, and the token-wise variants are left
out.
"""

import torch.nn.functional as F
from torch import Tensor


def reward_loss(better: Tensor, worse: Tensor, *, regularization: float = 0.001) -> Tensor:
    """-log sigmoid(R_w - R_l) + mu (R_w^2 + R_l^2), (B,), >= 0.

    better, worse (B,): end scores of the preferred and of the other answer, fp32. Gradient descent raises `better` and
    lowers `worse`; equal scores of 0 give log 2. The penalty fixes what the difference leaves open: the offset.
    """
    return -F.logsigmoid(better - worse) + regularization * (better.square() + worse.square())


def cost_loss(
    unsafer: Tensor,
    safer: Tensor,
    unsafer_sign: Tensor,
    safer_sign: Tensor,
    *,
    ordered: Tensor | float = 1.0,
    regularization: float = 0.001,
) -> Tensor:
    """-log sigmoid(C_u - C_s) - log sigmoid(s_u C_u) - log sigmoid(s_s C_s) + mu (C_u^2 + C_s^2), (B,), >= 0.

    unsafer, safer (B,): end scores of the more and of the less harmful answer, fp32; *_sign (B,): +1 for an answer
    labelled unsafe, -1 for one labelled safe; ordered (B,): 1, or 0 where neither answer is the more harmful one, whose
    pair then has its sign terms alone. Gradient descent raises the cost of the more harmful answer and lowers the
    other's, and moves each to its own side of 0; where both are safe (or both unsafe) the terms pull at one of them in
    opposite directions. Scores of 0 give 3 log 2.
    """
    order = -ordered * F.logsigmoid(unsafer - safer)
    signs = -F.logsigmoid(unsafer_sign * unsafer) - F.logsigmoid(safer_sign * safer)
    return order + signs + regularization * (unsafer.square() + safer.square())
