//! `tracing` and `metrics` as macros that are nothing without these features: what they are given is then not evaluated.

/// An event of the level `$level`; the rest is as in tracing's macros.
macro_rules! event {
    ($level:ident, $($event:tt)*) => {
        #[cfg(feature = "tracing")]
        tracing::$level!($($event)*);
    };
}

/// An event that may come often. The 1st, 2nd, 4th, 8th… of a series is a warning, the others are for debugging.
///
/// `$number` becomes the number of this event within its series, which the event may show as a field.
macro_rules! event_by_turn {
    ($number:ident = $count:expr, $($event:tt)*) => {
        #[cfg(feature = "tracing")]
        {
            let $number = $count;
            if $number.is_power_of_two() {
                tracing::warn!($($event)*);
            } else {
                tracing::debug!($($event)*);
            }
        }
    };
}

/// Adds one to a counter.
macro_rules! count {
    ($name:literal $(, $label:literal => $value:expr)* $(,)?) => {
        #[cfg(feature = "metrics")]
        metrics::counter!($name $(, $label => $value)*).increment(1);
    };
}

/// Sets a gauge.
macro_rules! gauge {
    ($name:literal $(, $label:literal => $value:expr)*; $gauge:expr) => {
        #[cfg(feature = "metrics")]
        metrics::gauge!($name $(, $label => $value)*).set($gauge);
    };
}
