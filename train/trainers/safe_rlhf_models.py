"""The models of Safe RLHF: policy, reference, reward and cost model, and a critic for each of the two.

    shared      one frozen backbone in memory. Policy, reward, cost and critics are LoRA adapters on it, switched
                before every pass; the critics start as copies of the scorers; the reference is the bare backbone.
    separate    a model each; the reference is the policy without its adapter, or a frozen copy (full fine-tuning).

Under an engine that shards parameters (FSDP, ZeRO-3) the frozen weights of every backbone's layers are spread over the
ranks by PyTorch's FSDP 2, and gathered layer by layer as passes need them. Adapters and heads stay whole on every rank,
and so do embeddings, norms and LM head: gradients, optimizer and checkpoints are those of an unsharded run. One rank of
each machine reads the weights (`sharding.read_in_shards`), the first sends them to all.

Passes are made role by role, each with its backward pass before the next one: the activations of one role are in
memory at a time, and gradient checkpointing recomputes with the adapter that was active.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate import PartialState
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from equipoise.eval.scorer import Scorer, load_scorer, load_scorer_head
from equipoise.eval.scorer_card import ScorerError, read_card, weights_hash
from equipoise.train.model import load_frozen, load_trainable, peft_config, uses_frozen_copy
from equipoise.train.planning.engine import SHARDED, Engine
from equipoise.train.recipe import ModelConfig
from equipoise.train.sharding import allocate, read_in_shards
from equipoise.train.trainers.completion_head import add_completion_head, base_causal_lm
from equipoise.train.trainers.rollout import RolloutBatch

POLICY = "policy"


def critic(kind: str) -> str:
    """The role of the critic of `reward` or `cost`."""
    return f"{kind}_critic"


@dataclass
class SafeRLHFModels:
    """See the module. Made by `load_shared` or `load_separate`; nothing of it is in training mode."""

    policy: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    shared: bool
    reference: PreTrainedModel | None = None
    """None: the policy without its adapter."""
    scorers: dict[str, Scorer] = field(default_factory=dict)
    """`reward` and `cost`, frozen; those there are."""
    critics: dict[str, Scorer] = field(default_factory=dict)
    """`reward` and `cost`, trained; those there are."""
    _active: tuple[str, bool] | None = field(default=None, init=False, repr=False)
    """In the shared layout: the active adapter, and whether it is being trained."""

    def __post_init__(self) -> None:
        add_completion_head(self.policy)
        if self.reference is not None:
            add_completion_head(self.reference)

    # ---- roles ------------------------------------------------------------------------------------------------------

    @property
    def roles(self) -> tuple[str, ...]:
        """What is trained."""
        return (POLICY, *(critic(kind) for kind in self.critics))

    @property
    def modules(self) -> list[nn.Module]:
        """Everything in memory, the policy's module first; in the shared layout scorers share its backbone."""
        found = [self.policy, self.reference, *self.scorers.values(), *self.critics.values()]
        return [module for module in found if module is not None]

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The trained parameters of a role by name, whichever adapter is active."""
        if role == POLICY:
            named = dict(self.policy.named_parameters())
        else:
            named = dict(self.critics[role.removesuffix("_critic")].named_parameters())
        if self.shared:
            return {n: p for n, p in named.items() if f".{role}." in n or n.startswith("score_head.")}
        return {n: p for n, p in named.items() if p.requires_grad}

    @contextmanager
    def training(self, role: str) -> Iterator[None]:
        """One role in training mode, and nothing else; in the shared layout with its adapter active."""
        module = self.policy if role == POLICY else self.critics[role.removesuffix("_critic")]
        self._activate(role, trained=True)
        module.train()
        try:
            yield
        finally:
            module.eval()

    def shard(self, device: torch.device) -> None:
        """Spread the frozen weights over the ranks; to be called before anything is on `device`. Collective.

        Parameters are others behind it.
        """
        mesh = init_device_mesh(device.type, (PartialState().num_processes,))
        for decoder in self._decoders:
            _shard_layers(decoder, mesh, device)
        for module in self.modules:
            allocate(module, device)
        _take_from_first(self.modules, device)
        for (
            decoder
        ) in self._decoders:  # the root, which lets one layer be gathered ahead, shards nothing itself
            fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()))

    @property
    def _decoders(self) -> list[Any]:
        """Of all modules; the shared layout has one."""
        found = [
            module.decoder if isinstance(module, Scorer) else base_causal_lm(cast(Any, module)).base_model
            for module in self.modules
        ]
        return list({id(decoder): decoder for decoder in found}.values())

    def _activate(self, role: str, *, trained: bool = False) -> None:
        if self.shared and self._active != (role, trained):  # switching walks over every layer
            assert isinstance(self.policy, PeftModel)
            self.policy.set_adapter(role, inference_mode=not trained)
            self._active = role, trained

    # ---- passes -----------------------------------------------------------------------------------------------------

    def acting(self) -> PreTrainedModel | PeftModel:
        """The policy as it samples and is saved, its adapter active."""
        self._activate(POLICY)
        return self.policy

    def log_probs(self, batch: RolloutBatch) -> Tensor:
        """log pi of every answer token, (N,) fp32; inside `training(POLICY)` with a gradient."""
        return _log_probs(self.policy, batch)

    def reference_log_probs(self, batch: RolloutBatch) -> Tensor:
        """log pi_ref of every answer token, (N,) fp32."""
        if self.reference is not None:
            return _log_probs(self.reference, batch)
        assert isinstance(self.policy, PeftModel)
        with self.policy.disable_adapter():
            return _log_probs(self.policy, batch)

    def score(self, kind: str, batch: RolloutBatch) -> Tensor:
        """The scorer's verdict on every answer, (B,) fp32: its score at the answer's last token."""
        self._activate(kind)
        return self.scorers[kind](batch.input_ids, batch.attention_mask).end_scores

    def values(self, kind: str, batch: RolloutBatch) -> Tensor:
        """The critic's value of the state that each answer token was sampled in, (N,) fp32.

        Inside `training(critic(kind))` with a gradient; else its adapter is activated first.
        """
        if not torch.is_grad_enabled():
            self._activate(critic(kind))
        scorer = self.critics[kind]
        return scorer(batch.input_ids, batch.attention_mask, end_index=batch.answer_index).end_scores

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """What is trained, `<role>:<name>` -> tensor on CPU."""
        return {
            f"{role}:{name}": parameter.detach().cpu().contiguous()
            for role in self.roles
            for name, parameter in self.parameters(role).items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore; raises ValueError when it was saved of other models."""
        own = {f"{role}:{name}": p for role in self.roles for name, p in self.parameters(role).items()}
        if {n: p.shape for n, p in own.items()} != {n: t.shape for n, t in state.items()}:
            raise ValueError("the checkpoint's parameters are not those of this stage's models")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])


def _shard_layers(decoder: PreTrainedModel, mesh: DeviceMesh, device: torch.device) -> None:
    """FSDP 2 on the frozen weights of the decoder's layers. Every pass goes through the decoder's own `__call__`."""
    kinds = set(decoder._no_split_modules or ())
    for layer in [module for module in decoder.modules() if type(module).__name__ in kinds]:
        allocate(layer, device)
        _take_from_first([layer], device)  # one layer at a time is whole on a device
        # The scorers' adapters are frozen as well. Quantised weights are bytes, which FSDP cannot take.
        kept = {
            parameter
            for name, parameter in layer.named_parameters()
            if "lora_" in name or parameter.requires_grad or not parameter.is_floating_point()
        }
        fully_shard(layer, mesh=mesh, ignored_params=kept)


def _take_from_first(modules: Sequence[nn.Module], device: torch.device) -> None:
    """Put what is not in shards on `device`, and into it what the first rank has. Collective."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    for tensor in tensors.values():
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)
            distributed.broadcast(tensor.data, src=0)


def _log_probs(model: PreTrainedModel | PeftModel, batch: RolloutBatch) -> Tensor:
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        completion_index=batch.answer_index,
        completion_targets=batch.answer_targets,
    ).log_probs


# ---- loading --------------------------------------------------------------------------------------------------------


def load_shared(
    config: ModelConfig, policy_folder: str, scorer_folders: dict[str, str | None], *, critics: bool
) -> SafeRLHFModels:
    """Everything as adapters on the backbone in `policy_folder`.

    scorer_folders: `reward` and `cost` -> its folder, or None where scores come from elsewhere (a critic of it then
    starts from nothing). Raises ScorerError for a scorer that is no adapter on this backbone.
    """
    new = peft_config(config)
    assert new is not None, "checked with the recipe: the shared layout needs adapters"
    backbone, tokenizer = load_trainable(config, policy_folder, engine=_engine())
    policy = get_peft_model(backbone, new, adapter_name=POLICY)
    models = SafeRLHFModels(policy, tokenizer, shared=True)
    for kind, folder in scorer_folders.items():
        if folder is not None:
            check_backbone(folder, policy_folder)
            policy.load_adapter(folder, adapter_name=kind)
            card = read_card(folder)
            models.scorers[kind] = Scorer(policy, load_scorer_head(folder), card).eval().requires_grad_(False)
        if critics:
            models.critics[kind] = _shared_critic(models, kind, new)
    _checkpoint_activations(policy, config)
    policy.eval()
    models.acting()
    return models


def check_backbone(folder: str, policy_folder: str) -> None:
    """The adapter was trained on the very weights that the policy starts from."""
    card = read_card(folder)
    if card.backbone is None:
        raise ScorerError(
            f"The scorer in {folder} is a whole model, and layout=shared puts an adapter onto the policy's backbone. "
            "Take layout=separate, or train the scorer with model.lora.enabled=true."
        )
    found = weights_hash(policy_folder)
    same = card.backbone == policy_folder if found is None else card.backbone_hash == found
    if not same:
        raise ScorerError(
            f"The scorer in {folder} is an adapter on `{card.backbone}` (weights {card.backbone_hash}), the policy "
            f"starts from `{policy_folder}` (weights {found}). layout=shared has one backbone for all: train the "
            "scorer from the model that the policy starts from, or take layout=separate."
        )


def _shared_critic(models: SafeRLHFModels, kind: str, new: PeftLoraConfig) -> Scorer:
    """An adapter and a head of the critic's own, starting as the scorer's where there is one."""
    policy, scorer, role = models.policy, models.scorers.get(kind), critic(kind)
    assert isinstance(policy, PeftModel)
    if scorer is None:
        policy.add_adapter(role, new)
        return Scorer(policy)
    theirs = policy.peft_config[kind]
    assert isinstance(theirs, PeftLoraConfig)
    policy.add_adapter(role, theirs)
    parameters = dict(policy.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if f".{role}." in name:
                parameter.copy_(parameters[name.replace(f".{role}.", f".{kind}.")])
    head = nn.Linear(scorer.score_head.in_features, 1, bias=scorer.score_head.bias is not None)
    head.load_state_dict(scorer.score_head.state_dict())
    return Scorer(policy, head, scorer.card)


def load_separate(
    config: ModelConfig, policy_folder: str, scorer_folders: dict[str, str | None], *, critics: bool
) -> SafeRLHFModels:
    """A model each. A critic whose scorer is a whole model gets a new adapter, or is trained whole, as the policy is.

    scorer_folders as in `load_shared`; a critic without a scorer starts from the policy's model.
    """
    policy, tokenizer = load_trainable(config, policy_folder, engine=_engine())
    new = peft_config(config)
    if new is not None:
        policy = get_peft_model(policy, new)
    else:
        policy.requires_grad_(True)
    models = SafeRLHFModels(
        policy.eval(),
        tokenizer,
        shared=False,
        reference=load_frozen(config, policy_folder, _engine()) if uses_frozen_copy(config) else None,
    )
    _checkpoint_activations(policy, config)
    for kind, folder in scorer_folders.items():
        if folder is not None:
            models.scorers[kind] = _load_scorer(config, folder)
        if critics:
            models.critics[kind] = _separate_critic(config, folder, policy_folder)
            _checkpoint_activations(models.critics[kind].backbone, config)
    return models


def _load_scorer(config: ModelConfig, folder: str) -> Scorer:
    with read_in_shards(config.dtype, _engine()) as device_map:
        return load_scorer(
            folder,
            config.dtype,  # type: ignore[arg-type]
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            device_map=device_map,
        )


def _engine() -> str | None:
    """What weights are read for: FSDP 2 shards them whichever engine it is that asks for shards."""
    return "fsdp2" if Engine.launched().name in SHARDED else None


def _separate_critic(config: ModelConfig, folder: str | None, policy_folder: str) -> Scorer:
    scorer = (
        _load_scorer(config, folder)
        if folder is not None
        else Scorer(load_frozen(config, policy_folder, _engine()))
    )
    new = peft_config(config)
    if isinstance(scorer.backbone, PeftModel):
        for name, parameter in scorer.backbone.named_parameters():
            parameter.requires_grad_("lora_" in name)
    elif new is not None:
        new.task_type = None  # a bare decoder has no `generate` for PEFT to wrap
        scorer.backbone = get_peft_model(scorer.backbone, new)
    else:
        scorer.backbone.requires_grad_(True)
    scorer.score_head.requires_grad_(True)
    return scorer.eval()


def _checkpoint_activations(model: nn.Module, config: ModelConfig) -> None:
    if config.gradient_checkpointing:
        kwargs = {"use_reentrant": False}
        base_causal_lm(model).activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
