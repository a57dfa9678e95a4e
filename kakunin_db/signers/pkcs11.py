"""Keys in a PKCS #11 token (an HSM, a smart card, SoftHSM): they are made there and sign there.

python-pkcs11 comes with the extra ``pkcs11`` and is imported when a token is opened.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar
from urllib.parse import quote

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils

from ..errors import BadInputError, SignerError, SignerUnavailableError
from .base import Signer, check_digest, check_rsa_key, check_signature, subject_key_id

# DER of DigestInfo up to the digest (RFC 8017, 9.2). The mechanism RSA_PKCS pads and signs it, and does not
# hash.
_SHA256_INFO = bytes.fromhex("3031300d060960864801650304020105000420")
# DER of the curve's name (RFC 5480, 2.1.1.1).
_P256 = bytes.fromhex("06082a8648ce3d030107")

# A session, or what was known through it, is gone: the token was removed, or something else in this process
# logged out or finalized the module. It is opened again, once.
_LOST = {
    "DeviceRemoved",
    "KeyHandleInvalid",
    "ObjectHandleInvalid",
    "SessionClosed",
    "SessionHandleInvalid",
    "TokenNotPresent",
    "UserNotLoggedIn",
}
_LATER = _LOST | {
    "DeviceError",
    "DeviceMemory",
    "FunctionFailed",
    "GeneralError",
    "HostMemory",
    "SessionCount",
}
_RIGHT_PIN = "Give the right one; a token locks after a few that are wrong."
_PIN = {
    "PinExpired": "Set a new PIN with the token's own tool.",
    "PinIncorrect": _RIGHT_PIN,
    "PinInvalid": _RIGHT_PIN,
    "PinLenRange": _RIGHT_PIN,
    "PinLocked": "Its security officer can unlock it, with the token's own tool.",
    "UserPinNotInitialized": "Its security officer sets one, with the token's own tool.",
}

_Result = TypeVar("_Result")
_PublicKey = TypeVar("_PublicKey", rsa.RSAPublicKey, ec.EllipticCurvePublicKey)


@dataclass(frozen=True)
class TokenName:
    """Which token: what is not None has to be as the token says. As in a PKCS #11 URI (RFC 7512)."""

    label: str | None = None
    serial: str | None = None
    model: str | None = None
    manufacturer: str | None = None

    def __str__(self) -> str:
        return ", ".join(f"{name} {value!r}" for name, value in vars(self).items() if value is not None)

    def matches(self, token: Any) -> bool:
        found = (token.label, token.serial.decode(errors="replace"), token.model, token.manufacturer_id)
        return all(want in (None, has) for want, has in zip(vars(self).values(), found, strict=True))


def _pkcs11() -> Any:
    try:
        import pkcs11  # noqa: PLC0415
    except ImportError as error:
        raise SignerError(
            "keys in a PKCS #11 token need python-pkcs11, which is not installed",
            "pip install 'kakunin-db[pkcs11]'",
        ) from error
    return pkcs11


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


# python-pkcs11 initializes a module for calls one at a time, and lets go of the GIL when it makes them.
_locks: dict[str, threading.RLock] = {}
_initialized_by: dict[str, int] = {}
_tokens: dict[tuple[str, TokenName], _Token] = {}


def _lock(module: str) -> threading.RLock:
    return _locks.setdefault(module, threading.RLock())


def _library(module: str) -> Any:
    """The module, initialized in this process."""
    pkcs11 = _pkcs11()
    with _lock(module):
        try:
            library = pkcs11.lib(module)
            if _initialized_by.setdefault(module, os.getpid()) != os.getpid():
                # After a fork a module has to be initialized again.
                with contextlib.suppress(pkcs11.PKCS11Error):
                    library.finalize()
                library.initialize()
                _initialized_by[module] = os.getpid()
        except pkcs11.PKCS11Error as error:
            raise SignerError(
                f"the PKCS #11 module {module} does not load: {_said(error)}", "Check module-path."
            ) from error
        return library


def _tokens_named(name: TokenName, module: str) -> list[Any]:
    library = _library(module)
    try:
        with _lock(module):
            return [token for token in library.get_tokens() if name.matches(token)]
    except _pkcs11().PKCS11Error as error:
        raise SignerUnavailableError(
            f"the PKCS #11 module {module} does not list its tokens: {_said(error)}",
            "Check the module's configuration, and try again.",
        ) from error


class _Token:
    """A token and this process's one login to it.

    A login holds for every session of the process, and closing the session that logged in ends it for all:
    so everyone who uses the token shares this.
    """

    def __init__(self, module: str, name: TokenName) -> None:
        self.module = module
        self.name = name  # exactly this token, by its label and serial
        self.pin: str | None = None
        self._lock = _lock(module)
        self._refused: str | None = None
        self._session: Any = None
        self._opened_by = 0

    def __str__(self) -> str:
        return f"the PKCS #11 token {self.name.label!r}"

    def login(self, pin: str) -> None:
        """Logs in, also where another PIN did before. Raises SignerError."""
        with self._lock:
            if pin == self.pin and self._session is not None:
                return
            before, self.pin, self._refused = self.pin, pin, None
            session, self._session = self._session, None
            if session is not None and self._opened_by == os.getpid():
                with contextlib.suppress(_pkcs11().PKCS11Error):
                    session.close()  # and so log out
            try:
                self._open()
            except SignerError:
                self.pin, self._refused = before, None
                raise

    def _open(self) -> Any:
        if self._refused is not None:  # the same PIN once more would bring the token nearer to locking
            raise self._pin_refused(self._refused)
        with self._errors("log in"):
            found = _tokens_named(self.name, self.module)
            if not found:
                raise SignerUnavailableError(f"{self} is not there any more", "Put it back and try again.")
            try:
                self._session = found[0].open(user_pin=self.pin)
            except _pkcs11().UserAlreadyLoggedIn:
                # By something else in this process, and for all of it.
                self._session = found[0].open()
        self._opened_by = os.getpid()
        return self._session

    def _pin_refused(self, name: str) -> SignerError:
        return SignerError(f"{self} refuses the PIN ({name})", _PIN[name])

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except _pkcs11().PKCS11Error as error:
            name = type(error).__name__
            if name in _PIN:
                self._refused = name
                raise self._pin_refused(name) from error
            message = f"{self} cannot {doing}: {_said(error)}"
            if name in _LATER:
                raise SignerUnavailableError(message, "Check that it is there, and try again.") from error
            hint = "Use a token that has RSA_PKCS, or for P-256 ECDSA." if "Mechanism" in name else None
            raise SignerError(message, hint) from error

    def run(self, doing: str, work: Callable[[Any], _Result], *, write: bool = False) -> _Result:
        """``work`` with a session that is logged in, one at a time; once more where the session was lost.

        ``doing`` is for the error: what the token cannot do. ``write`` is for changing objects.
        """
        with self._lock, self._errors(doing):
            if self._session is not None and self._opened_by == os.getpid():
                try:
                    return self._work(self._session, work, write)
                except _pkcs11().PKCS11Error as error:
                    if type(error).__name__ not in _LOST and "not initialized" not in str(error):
                        raise
            # Not closed: if the module was initialized again, its handle may be somebody else's by now.
            self._session = None
            return self._work(self._open(), work, write)

    def _work(self, session: Any, work: Callable[[Any], _Result], write: bool) -> _Result:
        if not write:
            return work(session)
        _check_alive(session)
        writing = session.token.open(rw=True)  # without a PIN: the process is logged in
        try:
            return work(writing)
        finally:
            with contextlib.suppress(_pkcs11().PKCS11Error):
                writing.close()


def _check_alive(session: Any) -> None:
    """Raises what is in _LOST when the session is not there or not logged in.

    A search would fail and then once more where nobody can catch it, or find none of the private objects.
    """
    pkcs11 = _pkcs11()
    attribute = pkcs11.Attribute
    passing = {attribute.CLASS: pkcs11.ObjectClass.DATA, attribute.TOKEN: False, attribute.PRIVATE: True}
    try:
        session.create_object(passing).destroy()
    except pkcs11.PKCS11Error as error:
        if type(error).__name__ in _LOST or "not initialized" in str(error):
            raise  # else the token does not keep data


def _open_token(module: str, name: TokenName | str, pin: str) -> _Token:
    if isinstance(name, str):
        name = TokenName(name)
    if not pin:
        raise BadInputError("a PKCS #11 token is not opened without a PIN")
    if "/" in module:
        module = os.path.realpath(module)  # a library cannot be initialized by two names
    found = _tokens_named(name, module)
    if len(found) != 1:
        raise SignerError(
            f"{len(found) or 'no'} PKCS #11 tokens with {name} in {module}",
            f"See them: pkcs11-tool --module {module} --list-token-slots",
        )
    exact = TokenName(found[0].label, found[0].serial.decode(errors="replace"))
    token = _tokens.setdefault((module, exact), _Token(module, exact))
    token.login(pin)
    return token


_Key = TypeVar("_Key", bound="_PKCS11Key[Any]")


class _PKCS11Key(Generic[_PublicKey]):
    _KIND: ClassVar[str]  # of pkcs11.KeyType
    _CALLED: ClassVar[str]
    _MAKE_ONE: ClassVar[str]

    def __init__(
        self,
        module: str,
        token: TokenName | str,
        pin: str,
        *,
        label: str | None = None,
        id: bytes | None = None,
    ) -> None:
        if not label and not id:
            raise BadInputError("a key in a PKCS #11 token is named by its label or its id")
        self._init(_open_token(module, token, pin), label, id)

    @classmethod
    def _in(cls: type[_Key], token: _Token, label: str | None, id: bytes | None) -> _Key:
        signer = cls.__new__(cls)
        signer._init(token, label, id)
        return signer

    def _init(self, token: _Token, label: str | None, id: bytes | None) -> None:
        self._token, self._label, self._id = token, label, id
        self._public_key: _PublicKey | None = None
        self._found: tuple[Any, Any] | None = None
        token.run(f"find {self.key_id}", self._private_key)

    @property
    def key_id(self) -> str:
        """A PKCS #11 URI (RFC 7512) without the module and the PIN."""
        return _key_id(self._token, self._label, self._id)

    def public_key(self) -> _PublicKey:
        assert self._public_key is not None  # noqa: S101  (set when the key was found)
        return self._public_key

    def _private_key(self, session: Any) -> Any:
        """The handle: of this session, so looked for again in another."""
        if self._found is None or self._found[0] is not session:
            self._found = (session, self._look_for_it(session))
        return self._found[1]

    def _look_for_it(self, session: Any) -> Any:
        pkcs11 = _pkcs11()
        attribute = pkcs11.Attribute
        key = _one_private_key(self._token, session, self._label, self._id)
        if key[attribute.KEY_TYPE] is not pkcs11.KeyType[self._KIND] or not key[attribute.SIGN]:
            raise SignerError(f"{self.key_id} is not {self._CALLED} key for signing", self._MAKE_ONE)
        if key[attribute.EXTRACTABLE] or not key[attribute.SENSITIVE]:
            raise SignerError(
                f"{self.key_id} can leave the token: it is extractable or not sensitive",
                f"Make one that cannot. {self._MAKE_ONE}",
            )
        try:
            public_key = self._public_half(session, key)
        except ValueError as error:
            raise SignerError(f"{self.key_id} has no usable public key: {error}", self._MAKE_ONE) from error
        if self._public_key is not None and public_key != self._public_key:
            raise SignerError(
                f"{self.key_id} is another key than it was", "Certify the agent with the new one."
            )
        self._public_key = public_key
        return key

    def _public_half(self, session: Any, key: Any) -> _PublicKey:
        """Raises ValueError where there is none, or no signature of it could be verified."""
        raise NotImplementedError

    def _signed(self, key: Any, digest: bytes, pin: str | None) -> bytes:
        raise NotImplementedError

    def _check(self, signature: bytes, digest: bytes, wrong: SignerError) -> None:
        raise NotImplementedError

    def sign(self, digest: bytes) -> bytes:
        check_digest(digest)
        always = _pkcs11().Attribute.ALWAYS_AUTHENTICATE

        def work(session: Any) -> bytes:
            key = self._private_key(session)
            return self._signed(key, digest, self._token.pin if key[always] else None)

        signature = self._token.run(f"sign with {self.key_id}", work)
        wrong = SignerError(
            f"the signature from {self._token} is not by the key that {self.key_id} was",
            "Open the signer again; if it stays so, the token is defective.",
        )
        self._check(signature, digest, wrong)
        return signature

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.key_id}>"


def _key_id(token: _Token, label: str | None, id: bytes | None) -> str:
    parts = [f"token={quote(token.name.label or '')}"]
    if label:
        parts.append(f"object={quote(label)}")
    if id:
        parts.append("id=" + "".join(f"%{byte:02x}" for byte in id))
    return "pkcs11:" + ";".join(parts)


def _one_private_key(token: _Token, session: Any, label: str | None, id: bytes | None) -> Any:
    pkcs11 = _pkcs11()
    attribute = pkcs11.Attribute
    wanted = {attribute.CLASS: pkcs11.ObjectClass.PRIVATE_KEY}
    if label:
        wanted[attribute.LABEL] = label
    if id:
        wanted[attribute.ID] = id
    _check_alive(session)
    found = list(session.get_objects(wanted))
    if len(found) != 1:
        raise SignerError(
            f"{token} has {len(found) or 'no'} private keys {_key_id(token, label, id)}",
            "Name one key: its label and id are in"
            f" pkcs11-tool --module {token.module} --login --list-objects --type privkey",
        )
    return found[0]


def _of_public_key(session: Any, key: Any, name: str) -> Any:
    """An attribute of the public key that has the private one's id, or None."""
    pkcs11 = _pkcs11()
    attribute = pkcs11.Attribute
    wanted = {
        attribute.CLASS: pkcs11.ObjectClass.PUBLIC_KEY,
        attribute.KEY_TYPE: key[attribute.KEY_TYPE],
        attribute.ID: key[attribute.ID],
    }
    return next((found[attribute[name]] for found in list(session.get_objects(wanted))), None)


class PKCS11Signer(_PKCS11Key[rsa.RSAPublicKey]):
    """An RSA key in a PKCS #11 token, found by its label, its id (CKA_ID), or both.

    ``module`` is the path of the token's library and ``token`` its label, or a TokenName. One login serves
    all keys of a token in this process. A session that was lost is opened again; after a fork, too.

    A key that the token would give out is refused, and every signature is verified before it is returned.
    Raises SignerError when the key cannot sign, and of those SignerUnavailableError when it may later.
    """

    _KIND = "RSA"
    _CALLED = "an RSA"
    _MAKE_ONE = "PKCS11Keys.create() makes one."

    def _public_half(self, session: Any, key: Any) -> rsa.RSAPublicKey:
        pkcs11 = _pkcs11()
        attribute = pkcs11.Attribute
        try:
            exponent = key[attribute.PUBLIC_EXPONENT]
        except pkcs11.AttributeTypeInvalid:  # which a private key need not have
            exponent = b""
        exponent = exponent or _of_public_key(session, key, "PUBLIC_EXPONENT") or b""
        modulus = int.from_bytes(key[attribute.MODULUS], "big")
        public_key = rsa.RSAPublicNumbers(int.from_bytes(exponent, "big"), modulus).public_key()
        check_rsa_key(public_key)
        return public_key

    def _signed(self, key: Any, digest: bytes, pin: str | None) -> bytes:
        signed: bytes = key.sign(_SHA256_INFO + digest, mechanism=_pkcs11().Mechanism.RSA_PKCS, pin=pin)
        return signed

    def _check(self, signature: bytes, digest: bytes, wrong: SignerError) -> None:
        check_signature(self.public_key(), signature, digest, wrong)


class PKCS11ECDSASigner(_PKCS11Key[ec.EllipticCurvePublicKey]):
    """A P-256 key in a PKCS #11 token, for JWTs (ES256); otherwise as :class:`PKCS11Signer`. The token has
    its public key, too, with the same id."""

    _KIND = "EC"
    _CALLED = "an elliptic-curve"
    _MAKE_ONE = "pkcs11-tool --keypairgen --key-type EC:prime256v1 --usage-sign --sensitive makes one."

    def _public_half(self, session: Any, key: Any) -> ec.EllipticCurvePublicKey:
        if key[_pkcs11().Attribute.EC_PARAMS] != _P256:
            raise BadInputError("its curve is not P-256")
        point = _of_public_key(session, key, "EC_POINT")
        if point is None:
            raise BadInputError("the token has none with its id")
        # The point (SEC 1 section 2.3.3) in a DER OCTET STRING, as PKCS #11 v3.1 section 6.3.3 has it; some
        # tokens give it bare, 33 or 65 bytes.
        bare = point[2:] if len(point) in (35, 67) else point
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), bare)

    def _signed(self, key: Any, digest: bytes, pin: str | None) -> bytes:
        signed: bytes = key.sign(digest, mechanism=_pkcs11().Mechanism.ECDSA, pin=pin)  # r and s
        return signed

    def _check(self, signature: bytes, digest: bytes, wrong: SignerError) -> None:
        if len(signature) != 64:
            raise wrong
        r, s = (int.from_bytes(half, "big") for half in (signature[:32], signature[32:]))
        try:
            self.public_key().verify(
                utils.encode_dss_signature(r, s), digest, ec.ECDSA(utils.Prehashed(hashes.SHA256()))
            )
        except InvalidSignature as error:
            raise wrong from error


def open_pkcs11_jwt_signer(
    module: str, token: TokenName | str, pin: str, *, label: str | None = None, id: bytes | None = None
) -> PKCS11Signer | PKCS11ECDSASigner:
    """The key as the signer of its kind, which the token is asked for. Raises SignerError."""
    opened, pkcs11 = _open_token(module, token, pin), _pkcs11()
    kind = opened.run(
        f"find {_key_id(opened, label, id)}",
        lambda session: _one_private_key(opened, session, label, id)[pkcs11.Attribute.KEY_TYPE],
    )
    cls: type[PKCS11Signer | PKCS11ECDSASigner]
    cls = PKCS11ECDSASigner if kind is pkcs11.KeyType.EC else PKCS11Signer
    return cls._in(opened, label, id)


class PKCS11Keys:
    """Makes keys in a PKCS #11 token, which cannot leave it, and finds them by their id (CKA_ID).

    The id is the subject key identifier, known once the key is made: the token has to let it be set then.
    Arguments and errors are as in :class:`PKCS11Signer`.
    """

    def __init__(self, module: str, token: TokenName | str, pin: str) -> None:
        self._token = _open_token(module, token, pin)

    def create(self, label: str) -> PKCS11Signer:
        pkcs11 = _pkcs11()
        attribute, can = pkcs11.Attribute, pkcs11.MechanismFlag

        def work(session: Any) -> bytes:
            pair = session.generate_keypair(
                pkcs11.KeyType.RSA,
                2048,
                label=label,
                store=True,
                capabilities=can.SIGN | can.VERIFY,
                private_template={
                    attribute.PRIVATE: True,
                    attribute.SENSITIVE: True,
                    attribute.EXTRACTABLE: False,
                },
            )
            try:
                modulus, exponent = (
                    int.from_bytes(pair[0][a], "big") for a in (attribute.MODULUS, attribute.PUBLIC_EXPONENT)
                )
                id = bytes.fromhex(subject_key_id(rsa.RSAPublicNumbers(exponent, modulus).public_key()))
                for key in pair:
                    key[attribute.ID] = id
            except BaseException as error:
                for key in pair:
                    with contextlib.suppress(pkcs11.PKCS11Error):
                        key.destroy()
                if isinstance(error, pkcs11.PKCS11Error):  # and not once more, with a second key
                    raise SignerError(
                        f"{self._token} made a key for {label!r} that cannot be found again: {_said(error)}",
                        "Use a token that lets CKA_ID be set.",
                    ) from error
                raise
            return id

        return PKCS11Signer._in(
            self._token, None, self._token.run(f"make a key for {label!r}", work, write=True)
        )

    def open(self, public_key: rsa.RSAPublicKey) -> PKCS11Signer:
        """Raises SignerError when the token has no such key, or one that it would give out."""
        signer = PKCS11Signer._in(self._token, None, bytes.fromhex(subject_key_id(public_key)))
        if signer.public_key() != public_key:
            raise SignerError(f"{signer.key_id} is another key than its id says", "Correct its CKA_ID.")
        return signer

    def discard(self, signer: Signer) -> None:
        pkcs11 = _pkcs11()
        id = bytes.fromhex(subject_key_id(signer.public_key()))

        def work(session: Any) -> None:
            for kind in (pkcs11.ObjectClass.PRIVATE_KEY, pkcs11.ObjectClass.PUBLIC_KEY):
                for key in list(session.get_objects({pkcs11.Attribute.CLASS: kind, pkcs11.Attribute.ID: id})):
                    key.destroy()

        self._token.run(f"delete {signer.key_id}", work, write=True)

    def __repr__(self) -> str:
        return f"<PKCS11Keys {self._token.name}>"
