"""What an error of the kit shows of its hint, and where it does not."""

from __future__ import annotations

import copy
import pickle
import sys
import traceback

import psycopg
import pytest

from kakunin_db import BadInputError, CertificateRevokedError, KakuninError
from kakunin_db.errors import named, refused


def shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tracebacks have notes from Python 3.11 on")
def test_a_traceback_shows_the_hint_and_str_does_not() -> None:
    error = CertificateRevokedError("certificate 3A was revoked", "Certify the agent anew.")
    assert str(error) == "certificate 3A was revoked"
    assert error.args == ("certificate 3A was revoked",)
    assert shown(error).endswith("certificate 3A was revoked\nhint: Certify the agent anew.\n")
    assert "hint" not in shown(KakuninError("no more to say"))


def test_a_hint_that_changes_is_shown_once_and_other_notes_stay() -> None:
    error = BadInputError("x", "First.")
    error.__notes__.append("noted")
    error.hint = "Second."
    assert error.__notes__ == ["noted", "hint: Second."]
    error.hint = None
    assert error.__notes__ == ["noted"]


def test_copies_have_it_once() -> None:
    error = BadInputError("x", "Do this.")
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (str(again), again.hint, again.__notes__) == ("x", "Do this.", ["hint: Do this."])
        again.hint = "That."
        assert again.__notes__ == ["hint: That."]
    assert error.__notes__ == ["hint: Do this."]


def test_what_the_server_said_is_shown_and_the_driver_s_error_is_as_it_was() -> None:
    def said(state: str) -> psycopg.Error:
        error = type("Said", (psycopg.Error,), {"sqlstate": state})("no")
        error.hint = "Ask."
        error.__notes__ = ["the driver's"]
        return error

    ours = named(said("KA002"))
    assert isinstance(ours, CertificateRevokedError)
    assert ours.__notes__ == ["hint: Ask."]
    theirs = said("42501")
    both = refused(theirs)
    assert both is not None
    assert both.hint == "Ask."
    assert both.__notes__ == ["the driver's", "hint: Ask."]
    assert theirs.__notes__ == ["the driver's"]
