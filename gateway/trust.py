"""Whose certificates are trusted where a catalog says nothing else."""

from __future__ import annotations

import ssl
from collections.abc import Mapping

__all__ = ["private", "public_context"]


def public_context(environ: Mapping[str, str]) -> ssl.SSLContext:
    """A client's context with the authorities of SSL_CERT_FILE and SSL_CERT_DIR where one is set, else certifi's.

    Blocks for a moment. Raises OSError (ssl.SSLError is one) or ValueError where these hold none.
    """
    file, folder = environ.get("SSL_CERT_FILE") or None, environ.get("SSL_CERT_DIR") or None
    if file or folder:
        return ssl.create_default_context(cafile=file, capath=folder)
    import certifi

    # Not certifi.where(): inside an archive that would leave a temporary file behind (design.md section 12).
    return ssl.create_default_context(cadata=certifi.contents())


def private(context: ssl.SSLContext) -> ssl.SSLContext:
    """The same context, for somebody's own authority.

    Python 3.13 and later are strict, and refuse what kubeadm has made for years and the commands in Docker's
    documentation make.
    """
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context
