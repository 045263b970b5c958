//! Lets only those deliveries through that fal has signed for you.
