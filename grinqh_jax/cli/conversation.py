"""A conversation with a model, and the commands that change it."""

import argparse
import dataclasses
import functools
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from grinqh_jax.cli import command, flags
from grinqh_jax.cli.generation import compiling, print_statistics
from grinqh_jax.decoding.request import Request
from grinqh_jax.errors import UsageError

if TYPE_CHECKING:
    from grinqh_jax.decoding.speculation.speculation import Speculation
    from grinqh_jax.decoding.statistics import Statistics

MESSAGE_TOKENS = 256
"""Number of tokens of the next message for which programs are compiled in advance."""


class Conversation:
    """The turns of a conversation and the settings of the next answer.

    Attributes:
      ended: Whether the user has ended it.
    """

    def __init__(
        self,
        generator,
        request: Request,
        system: list[dict[str, str]],
        *,
        max_context: int | None,
        with_statistics: bool,
        speculation: "Speculation | None" = None,
    ):
        """Starts a conversation without turns.

        Args:
          generator: ``Generator`` of a model with a chat template.
          request: Settings of every answer.
          system: System message, or an empty list.
          max_context: Most tokens of the conversation; None for the model's limit.
          with_statistics: Whether to print the statistics of every answer.
          speculation: How to speculate, if at all.
        """
        from grinqh_jax.decoding.prompt_cache import PromptCache

        self.ended = False
        self._generator = generator
        self._request = request
        self._system = system
        self._max_context = max_context
        self._with_statistics = with_statistics
        self._speculation = speculation
        self._turns: list[dict[str, str]] = []
        self._prompt_cache = PromptCache(few_sizes=True)
        self._capacity = 0
        self._statistics: "Statistics | None" = None
        self._tokens = 0
        self._warned = False

    def say(self, text: str) -> None:
        """Sends the user's message and prints the answer. Ctrl-C ends the answer.

        Raises:
          UsageError: the conversation does not fit the context, or the chat template rejects it. The message
            is not part of the conversation then.
        """
        turns = [*self._turns, {"role": "user", "content": text}]
        try:
            with compiling():
                generation = self._generator.generate(
                    self._generator.tokenizer.chat([*self._system, *turns]),
                    self._request,
                    max_context=self._max_context,
                    prompt_cache=self._prompt_cache,
                    speculation=self._speculation,
                )
                generation.prepare()
        except KeyboardInterrupt:
            _report("interrupted")
            return
        interrupted = False
        try:
            for piece in generation:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            interrupted = True
        print(flush=True)
        if generation.text or not interrupted:
            self._turns = [*turns, {"role": "assistant", "content": generation.text}]
        self._statistics = statistics = generation.statistics()
        self._tokens = statistics.prompt_tokens + statistics.generated_tokens
        if interrupted:
            print("interrupted", file=sys.stderr)
        elif generation.finish_reason == "length":
            reason = "--max-tokens" if len(generation.tokens) == self._request.max_tokens else "the context"
            print(
                f"the answer ended after {len(generation.tokens)} tokens, the limit of {reason}",
                file=sys.stderr,
            )
        if self._with_statistics:
            print_statistics(statistics)
        elif (warning := statistics.warning()) and not self._warned:
            print(f"warning: {warning}", file=sys.stderr)
            self._warned = True  # The warning would be the same for every further answer.

    def compile_ahead(self) -> None:
        """Compiles the programs of the next turn in the background, unless that was done before."""
        from grinqh_jax.decoding.programs import in_background
        from grinqh_jax.decoding.prompt_cache import conversation_capacity

        capacity = conversation_capacity(self._tokens + self._request.max_tokens + MESSAGE_TOKENS)
        if capacity > self._capacity:
            self._capacity = capacity
            in_background(
                functools.partial(
                    self._generator.compile_conversation,
                    self._request,
                    context=capacity,
                    max_context=self._max_context,
                    speculation=self._speculation,
                )
            )

    def setting(self) -> str:
        """Returns the setting of the dial in words."""
        bits = self._generator.bits(self._request.bits)
        return "full precision" if bits is None else f"{bits:g} bits per weight"

    def set_bits(self, text: str) -> None:
        """Turns the dial, from the next answer on. Raises UsageError for a setting that does not exist."""
        try:
            bits = flags.bits(text)
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"/bits: {error}") from None
        self._generator.bits(bits)  # refuses what the model does not support
        self._request = dataclasses.replace(self._request, bits=bits)
        _report(f"the next answer reads {self.setting()}")

    def set_system(self, text: str) -> None:
        """Replaces the system message, from the next answer on; shows it if ``text`` is empty."""
        if text:
            self._system = [{"role": "system", "content": text}]
        _report(f"system message: {self._system[0]['content'] if self._system else 'none'}")

    def reset(self, _: str) -> None:
        """Forgets all turns, but not the system message."""
        self._turns, self._statistics, self._tokens = [], None, 0
        _report("the conversation starts anew")

    def show_statistics(self, _: str) -> None:
        """Prints the statistics of the last answer."""
        if self._statistics is None:
            _report("no answer yet")
        else:
            print_statistics(self._statistics)

    def end(self, _: str) -> None:
        """Ends the conversation."""
        self.ended = True


@dataclasses.dataclass(frozen=True)
class Command:
    """A line of input that is a command and not a message.

    Attributes:
      usage: The line, with a name for its argument.
      purpose: One line of help.
      run: Function of the conversation and the argument.
    """

    usage: str
    purpose: str
    run: Callable[[Conversation, str], None]


def _help(_: Conversation, __: str) -> None:
    for one in COMMANDS.values():
        _report(f"  {one.usage:<14}{one.purpose}")
    _report(
        "Ctrl-C ends an answer, Ctrl-D the conversation. The arrow keys edit a line and find earlier lines."
    )


COMMANDS = {
    "/help": Command("/help", "list the commands", _help),
    "/bits": Command(
        "/bits B", "read B bits per weight, or full, from the next answer on", Conversation.set_bits
    ),
    "/system": Command(
        "/system TEXT", "set the system message; without TEXT, show it", Conversation.set_system
    ),
    "/reset": Command("/reset", "forget the turns, but not the system message", Conversation.reset),
    "/stats": Command(
        "/stats", "print speed, bits and memory of the last answer", Conversation.show_statistics
    ),
    "/exit": Command("/exit", "end the conversation", Conversation.end),
}
"""Commands by name."""

_ALIASES = {"/quit": "/exit", "/bye": "/exit", "/clear": "/reset", "/?": "/help"}
"""Names of commands in similar programs."""


def run_command(conversation: Conversation, line: str) -> bool:
    """Runs the command of a line; returns False if the line is a message.

    Raises:
      UsageError: there is no such command, or its argument is wrong.
    """
    name, _, argument = line.partition(" ")
    if not re.fullmatch(r"/[a-z?]+", name):
        return False
    name = _ALIASES.get(name, name)
    if name not in COMMANDS:
        meant = command.did_you_mean(command.closest(name, COMMANDS))
        raise UsageError(f"unknown command {name}{meant or '; /help lists the commands'}")
    COMMANDS[name].run(conversation, argument.strip())
    return True


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
