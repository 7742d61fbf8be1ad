"""TLS: certificate and key, read and matched before the model is loaded."""

from __future__ import annotations

import ssl
from pathlib import Path

from sleb.errors import ConfigError
from sleb.fields import shown_path


def server_context(
    certificates: Path, key: Path | None, password: str | None, client_authorities: Path | None
) -> ssl.SSLContext:
    """What a server's connections are encrypted with: TLS 1.2 or newer.

    Args:
        certificates: the server's own and those up to a root, in PEM. key: its key, if that is not there too. password:
            of the key. client_authorities: who signs the certificates that clients must then show.

    Raises ConfigError for a file that cannot be read or is none, a key of another certificate, and a wrong password.
    """
    texts = {
        "--ssl-certfile": certificates,
        "--ssl-keyfile": key,
        "--ssl-ca-certs": client_authorities,
    }
    for flag, path in texts.items():
        if path is not None:
            _check_readable(flag, path)
    holder = f"--ssl-certfile {shown_path(certificates)}"
    if key is not None:
        holder = f"--ssl-keyfile {shown_path(key)}"
    asked = False

    def tell_password() -> str:  # without this OpenSSL would ask at the terminal
        nonlocal asked
        asked = True
        return password or ""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificates, key, tell_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"the key of {holder} is not that of the first certificate in --ssl-certfile "
                f"{shown_path(certificates)}; name the two that belong together"
            ) from None
        if asked and not password:
            raise ConfigError(
                f"the key of {holder} is encrypted; give its password by --ssl-keyfile-password, or by the variable "
                "SLEB_SSL_KEYFILE_PASSWORD, which other users do not see"
            ) from None
        if asked:
            raise ConfigError(f"--ssl-keyfile-password does not open the key of {holder}") from None
        raise ConfigError(
            f"no certificate and key can be read from --ssl-certfile {shown_path(certificates)}"
            f"{'' if key is None else f' and {holder}'} ({error.reason or error}); both must be PEM"
        ) from None
    if client_authorities is not None:
        try:
            context.load_verify_locations(client_authorities)
        except ssl.SSLError as error:
            raise ConfigError(
                f"--ssl-ca-certs {shown_path(client_authorities)} holds no certificate in PEM ({error.reason or error})"
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check_readable(flag: str, path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"{flag} {shown_path(path)} cannot be read: {error.strerror}") from None
