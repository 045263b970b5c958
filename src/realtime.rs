//! Short-lived tokens for browsers, minted with the server's own credential.
