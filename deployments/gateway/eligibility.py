"""Which arms may answer a request, as far as that is certain before a decision; and what its parameters do to it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from deployments.dispatch.router_client import RouterClient
from deployments.errors import ApiError
from deployments.models import capabilities, context_length
from deployments.models.handle import Body
from deployments.parameters.chat import ChatRequest
from deployments.parameters.completion import CompletionRequest
from deployments.parameters.embedding import EmbeddingRequest
from deployments.parameters.generation import Texts
from deployments.parameters.needs import Need, capability_names
from deployments.profiler.reader import TOKENS_PER_MESSAGE
from policies.capabilities import MEDIA
from policies.constraints import candidates
from policies.types import Arm, Objective, Request, TaskProfile

AnyRequest = ChatRequest | CompletionRequest | EmbeddingRequest


class Eligibility:
    """Refuses what no arm can answer. What only some arms can answer is left to the policy (policies/constraints.py).

    Args:
        router_client: knows what each arm lacks, and whether tokens are counted.
        arms: all arms by name.
        media_hosts: hosts from which engines may fetch images, audio and videos.
    """

    def __init__(
        self,
        router_client: RouterClient,
        arms: Mapping[str, Arm],
        media_hosts: Collection[str] = (),
    ):
        self._router_client = router_client
        self._arms = arms
        self._media_hosts = frozenset(media_hosts)

    def check_media(self, request: AnyRequest) -> None:
        """Refuse images, audio and videos that an engine would fetch from a host which the settings do not name.

        Raises:
            ApiError: 400, with the place.
        """
        if not isinstance(request, ChatRequest):
            return
        for where, medium in request.media():
            if medium.host is None or medium.host in self._media_hosts:
                continue
            hosts = ", ".join(sorted(self._media_hosts)) or "no host"
            raise ApiError(
                400,
                f"{where}: {medium.noun} is fetched from {hosts} here; send a data URL",
                where,
            )

    def _candidates(self, task: str, objective: Objective) -> list[Arm]:
        return candidates(self._arms.values(), task, objective)

    def check_needs(
        self, task: str, needs: Sequence[Need], objective: Objective
    ) -> None:
        """Refuse a request that needs what none of the arms that may answer can do.

        Raises:
            ApiError: 400, with the parameter that needs it.
        """
        names = [arm.name for arm in self._candidates(task, objective)]
        lacks = [self._router_client.lacks(name) for name in names]
        needed = {need.capability.value for need in needs}
        if not names or not all(needed & missing for missing in lacks):
            return
        # of several needs, one that no arm meets; or else the first that one of them does not meet
        nowhere = frozenset.intersection(*lacks)
        somewhere = frozenset.union(*lacks)
        for without in (nowhere, somewhere):
            for need in needs:
                if need.capability.value in without:
                    raise capabilities.refusal(
                        need.capability, need.parameter, ", ".join(names)
                    )

    def adjusted(
        self,
        profile: TaskProfile,
        request: AnyRequest,
        read: Texts,
        needs: Sequence[Need],
        objective: Objective,
    ) -> TaskProfile:
        """The profile of a request's text with what its parameters change: needs, media, limits and cuts."""
        if isinstance(request, EmbeddingRequest):
            return profile
        least = request.min_tokens or 0
        cut = self._cut(profile.task, request, objective)
        if not (needs or least or cut or read.media_tokens):
            return profile
        tokens = profile.prompt_tokens
        longest = profile.longest_prompt_tokens
        if cut is not None:
            longest = min(longest, cut)
            tokens = min(tokens, cut * max(1, len(read.parts), len(read.token_counts)))
        return replace(
            profile,
            prompt_tokens=tokens + read.media_tokens,
            longest_prompt_tokens=longest,
            needs=capability_names(needs),
            min_output_tokens=least,
        )

    def _cut(
        self,
        task: str,
        request: ChatRequest | CompletionRequest,
        objective: Objective,
    ) -> int | None:
        """To how many tokens the engine cuts each prompt; None if it cuts none.

        A prompt that shall be cut to what there is room for goes to the arms that have room for all of it, or else to
        those with the largest context.
        """
        wanted = request.truncate_prompt_tokens
        may_answer = self._candidates(task, objective)
        if wanted is None or wanted > 0 or not may_answer:
            return wanted
        largest = max(arm.context_tokens for arm in may_answer)
        return max(1, largest - max(request.limit(), request.min_tokens or 0, 1))

    def check_length(self, asked: Request, body: Body) -> None:
        """Refuse a request that fits into the context of no arm that may answer, as far as that is certain.

        A chat template puts at least one token around each message. Without a tokenizer only the client's own limit
        on the answer is certain. The policy removes the arms that are too small by the number that it expects.
        """
        profile = asked.profile
        may_answer = self._candidates(profile.task, asked.objective)
        if profile.task == "embed" or not may_answer:
            return
        largest = max(arm.context_tokens for arm in may_answer)
        prompt = 0
        estimated = asked.fallback or not MEDIA.isdisjoint(profile.needs)
        if self._router_client.counts_tokens and not estimated:
            prompt = profile.longest_prompt_tokens or profile.prompt_tokens
            messages = body.get("messages")
            if isinstance(messages, list):
                prompt -= (TOKENS_PER_MESSAGE - 1) * len(messages)
        answer = max(context_length.answer_tokens(body), 1)
        cut = body.get("truncate_prompt_tokens")
        if isinstance(cut, int) and cut + answer > largest:
            raise context_length.cut_too_long(largest, cut, body)
        if max(prompt, 1) + answer > largest:
            raise context_length.refusal(largest, prompt, body)
