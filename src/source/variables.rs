//! The variables that hold a key, in the environment or in a `.env` file.

use std::{fmt, iter, sync::Arc};

use zeroize::Zeroizing;

use crate::{
    credential::{Credential, trim},
    error::SourceError,
};

/// Where a key is: in one variable, or in two halves.
#[derive(Clone)]
pub(super) enum KeyVariables {
    Whole(String),
    Halves { id: String, secret: String },
}

impl KeyVariables {
    pub(super) fn whole() -> Self {
        Self::Whole("FAL_KEY".into())
    }

    pub(super) fn halves() -> Self {
        Self::Halves { id: "FAL_KEY_ID".into(), secret: "FAL_KEY_SECRET".into() }
    }

    /// The credential, if it is there; half a pair is an error. A variable without a value, or with a blank one, counts as
    /// unset. `source` is what the credential and an error name.
    pub(super) fn load(
        &self,
        source: &str,
        value: impl Fn(&str) -> Option<Zeroizing<Vec<u8>>>,
    ) -> Result<Option<Credential>, SourceError> {
        let value = |variable| value(variable).filter(|value| !trim(value).is_empty());
        let half = |set, unset| {
            let message = format!("{} is set and {} is not: set both", shown(set), shown(unset));
            Err(SourceError::not_found(source, message))
        };
        let credential = match self {
            Self::Whole(variable) => value(variable).map(|key| Credential::key(&*key)),
            Self::Halves { id, secret } => match (value(id), value(secret)) {
                (None, None) => None,
                (Some(id), Some(secret)) => Some(Credential::key_pair(&*id, &*secret)),
                (Some(_), None) => return half(id, secret),
                (None, Some(_)) => return half(secret, id),
            },
        };
        match credential {
            None => Ok(None),
            Some(Ok(credential)) => Ok(Some(credential.with_source(Arc::from(source)))),
            Some(Err(error)) => Err(SourceError::malformed(source, error)),
        }
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        let (first, second) = match self {
            Self::Whole(variable) => (variable, None),
            Self::Halves { id, secret } => (id, Some(secret)),
        };
        iter::once(first).chain(second).map(String::as_str)
    }
}

impl fmt::Display for KeyVariables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.names().map(shown).collect();
        f.write_str(&names.join("+"))
    }
}

/// The name of a variable as it is shown. `EnvSource::key_from(env::var("FAL_KEY")?)` must not show the key.
pub(super) fn shown(variable: &str) -> &str {
    let is_name = variable.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if is_name { variable } else { "(not shown, as it may be a key in place of a variable's name)" }
}
