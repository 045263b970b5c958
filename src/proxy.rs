//! Browsers send their requests for fal to your server, and the key stays on it.
