"""Programs are compiled once, whichever thread asks first, and an error reaches every thread that waits."""

import threading
import time
from types import SimpleNamespace

import pytest

from grinqh_jax.decoding import programs as programs_module
from grinqh_jax.decoding.programs import THREAD_NAME, Programs, compiling, in_background


class Compiler:
    """Lowerings that count and can be held up."""

    def __init__(self):
        self.compiled: list[str] = []
        self.go_on = threading.Event()
        self.started = threading.Event()
        self.error: Exception | None = None

    def lowering(self, name: str):
        def compile():
            self.started.set()
            assert self.go_on.wait(10)
            if self.error:
                raise self.error
            self.compiled.append(name)

        return lambda: SimpleNamespace(compile=compile)


def test_two_threads_compile_a_program_once():
    programs, compiler = Programs(), Compiler()
    lowerings = {name: compiler.lowering(name) for name in "abc"}
    in_background(lambda: programs.compile(lowerings))
    assert compiler.started.wait(10)
    assert compiling()
    waiting = threading.Thread(target=programs.compile, args=(lowerings,))
    waiting.start()
    compiler.go_on.set()
    waiting.join(10)
    assert sorted(compiler.compiled) == ["a", "b", "c"]
    for thread in threading.enumerate():
        if thread.name == THREAD_NAME:
            thread.join(10)
    assert not compiling()


def test_an_error_is_raised_where_the_program_is_needed_and_the_next_call_tries_again():
    programs, compiler = Programs(), Compiler()
    compiler.error = MemoryError("no space")
    compiler.go_on.set()
    with pytest.raises(MemoryError, match="no space"):
        programs.compile({name: compiler.lowering(name) for name in "ab"})

    def broken():
        raise ValueError("no such shape")

    with pytest.raises(ValueError, match="no such shape"):
        programs.compile({"c": broken, "d": compiler.lowering("d")})
    compiler.error = None
    programs.compile({name: compiler.lowering(name) for name in "abcd"})
    assert sorted(compiler.compiled) == ["a", "b", "c", "d"]


def test_no_more_programs_are_compiled_at_once_than_there_are_processors(monkeypatch):
    monkeypatch.setattr(programs_module, "AT_ONCE", 2)
    lock, running, most = threading.Lock(), set(), []

    def lowering(name):
        def compile():
            with lock:
                running.add(name)
                most.append(len(running))
            time.sleep(0.02)
            with lock:
                running.remove(name)

        return lambda: SimpleNamespace(compile=compile)

    Programs().compile({name: lowering(name) for name in "abcdef"})
    assert len(most) == 6
    assert max(most) == 2
