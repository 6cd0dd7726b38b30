"""Checkpoints that try to run code."""

from __future__ import annotations

from attacks import pickles as p
from attacks.attack import CANARY, COMMAND, Attack, Attacks, in_metadata, in_object

__all__ = ["attacks"]


def _execution() -> Attacks:
    system = p.call("os", "system", p.text(COMMAND))
    source = f"__import__('pathlib').Path({CANARY!r}).touch()"
    inert = [
        ("object_os_system", system, "An object calls os.system."),
        ("object_posix_system", p.call("posix", "system", p.text(COMMAND)), "By another name."),
        ("object_eval", p.call("builtins", "eval", p.text(source)), "An object evaluates code."),
        ("object_exec", p.call("builtins", "exec", p.text(source)), "An object executes code."),
        (
            "object_getattr_chain",
            p.call(
                "builtins",
                "getattr",
                p.call("builtins", "__import__", p.text("os")),
                p.text("system"),
            )
            + p.sequence(p.text(COMMAND))
            + p.REDUCE,
            "The function to call is the result of a call.",
        ),
        (
            "object_qualified_name",
            p.call("pathlib", "Path.touch", p.call("pathlib", "PosixPath", p.text(CANARY))),
            "A method by its qualified name.",
        ),
        (
            "object_inst",
            p.MARK + p.text(COMMAND) + b"ios\nsystem\n",
            "The opcode INST of protocol 0 calls by name.",
        ),
        (
            "object_obj",
            p.MARK + p.named("os", "system") + p.text(COMMAND) + b"o",
            "The opcode OBJ calls what is on the stack.",
        ),
        (
            "object_newobj_ex",
            p.named("subprocess", "Popen")
            + p.sequence(p.listing(p.text("touch"), p.text(CANARY)))
            + p.mapping()
            + b"\x92",
            "A process as a new instance.",
        ),
        (
            "object_slot_state",
            p.new(
                "collections",
                "UserDict",
                p.sequence(p.NONE, p.attributes(__class__=p.named("os", "_wrap_close"))),
            ),
            "A state for slots sets __class__.",
        ),
        (
            "object_partial",
            p.call("functools", "partial", p.named("os", "system"), p.text(COMMAND)) + b")R",
            "A partial function is made, and called.",
        ),
        (
            "object_torch_load",
            p.call("torch", "load", p.text(CANARY)),
            "torch.load inside torch.load.",
        ),
        (
            "object_defaultdict",
            p.call("collections", "defaultdict", p.named("os", "getpid")),
            "Reading a missing key calls the factory.",
        ),
    ]
    for name, pickle, what in inert:
        yield name, Attack(in_object(pickle), "", what)
    entries = {"w": p.tensor()}
    good = [p.key("w", p.size(0, 0)), p.place("data", 0, p.GOOD)]
    paths = p.mapping(p.text("w"), system)
    yield (
        "metadata_os_system",
        Attack(
            in_metadata(p.metadata(entries, good, paths)),
            "path",
            "A path is the result of os.system.",
        ),
    )
    yield (
        "metadata_is_a_call",
        Attack(in_metadata(p.PROTOCOL + system + p.STOP), "not of DCP's Metadata", "A call."),
    )
    yield (
        "metadata_class_state",
        Attack(
            in_metadata(
                p.PROTOCOL
                + p.new(
                    p.METADATA,
                    "Metadata",
                    p.sequence(p.NONE, p.attributes(__class__=p.named("os", "_wrap_close"))),
                )
                + p.STOP
            ),
            "without its attributes",
            "A slot state for Metadata sets __class__.",
        ),
    )
    yield (
        "object_list_state",
        Attack(
            in_object(p.listing() + p.mapping() + p.BUILD),
            "takes no state",
            "A list is given a state.",
        ),
    )
    yield (
        "object_extension",
        Attack(in_object(b"\x82\x01"), "registry of extensions", "A class by its number."),
    )
    yield (
        "object_persistent_id",
        Attack(
            in_object(p.text("file:///etc/passwd") + b"Q"), "not a storage", "A free persistent id."
        ),
    )
    yield (
        "metadata_persistent_id",
        Attack(
            in_metadata(p.PROTOCOL + p.text("x") + b"Q" + p.STOP),
            "persistent id",
            "There, too.",
        ),
    )
    yield (
        "object_buffer",
        Attack(in_object(b"\x97"), "buffer from outside", "A buffer that is not in the pickle."),
    )


def attacks() -> Attacks:
    """Return all attacks of this module, by name."""
    yield from _execution()
