"""``/v1/tokenize`` and ``/v1/detokenize``."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from grinqh_jax.errors import UsageError
from grinqh_jax.server.body import parse
from grinqh_jax.server.conversation import Conversations
from grinqh_jax.server.errors import APIError
from grinqh_jax.server.schema import Detokenize, Tokenize
from grinqh_jax.server.service import Service


class Tokens:
    """Converts between texts and tokens."""

    def __init__(self, service: Service, conversations: Conversations):
        self._service = service
        self._conversations = conversations

    async def tokenize(self, request: Request) -> Response:
        """Returns the tokens of a text or of messages."""
        body = await parse(request, Tokenize, self._service.limits)
        self._service.bits(body.model)
        tokens = await self._service.in_thread(request, self._encode, body)
        return JSONResponse({"count": len(tokens), "max_model_len": self._service.context, "tokens": tokens})

    async def detokenize(self, request: Request) -> Response:
        """Returns the text of tokens, special tokens included."""
        body = await parse(request, Detokenize, self._service.limits)
        self._service.bits(body.model)
        generator = self._service.generator
        try:
            if body.tokens:
                generator.model.config.check_tokens(body.tokens)
        except UsageError as error:
            raise APIError(400, f"tokens: {error}", param="tokens") from None
        text = await self._service.in_thread(request, self._decode, body.tokens)
        return JSONResponse({"prompt": text})

    def _encode(self, body: Tokenize) -> list[int]:
        if body.messages is not None:
            prompt = self._conversations.prompt(
                body.messages,
                body.tools,
                body.chat_template_kwargs,
                add_generation_prompt=body.add_generation_prompt,
            )
            return prompt.tokens
        try:
            return self._service.generator.tokenizer.encode(
                body.prompt or "", special_tokens=body.add_special_tokens
            )
        except UsageError as error:
            raise APIError(400, f"prompt: {error}", param="prompt") from None

    def _decode(self, tokens: list[int]) -> str:
        return self._service.generator.tokenizer.decode(tokens, special_tokens=True)
