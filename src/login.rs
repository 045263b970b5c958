//! The login with GitHub that fal's own tools make.
