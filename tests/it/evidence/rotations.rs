//! A hostile application is called 10 times a second during 100 rotations, in every order.

use super::{
    Duration, Hostile, SECOND, World,
    client::{Kind, Network},
    sleep, told,
};

const ROTATIONS: u64 = 100;

#[derive(Clone, Copy, Debug)]
enum Order {
    /// The store has the new key for a while before fal knows it.
    NewKeyEarly,
    /// fal no longer knows the old key for a while before the source has the new one.
    RevokedFirst,
    Both,
}

/// Rotates in this order, under load, without the hostile application and with it.
#[allow(clippy::print_stdout)] // the figures, after minutes
async fn rotate(order: Order, kind: Kind, network: Network, period: Duration) {
    for hostile in [Hostile::Absent, Hostile::Both] {
        let world = World::new(kind, network, hostile, None).await;
        let mut late = Vec::new();
        let outcome = told(world, period, async |world| {
            let lies = world.lie_every(SECOND / 10);
            for n in 2..2 + ROTATIONS {
                let is_early = match order {
                    Order::NewKeyEarly => true,
                    Order::RevokedFirst => false,
                    Order::Both => n % 2 == 0,
                };
                let gap = Duration::from_millis(fastrand::u64(100..=500));
                if is_early {
                    world.bring(n).await;
                    sleep(gap).await;
                    world.switch_to(n);
                } else {
                    let revoked = world.begin.elapsed();
                    world.switch_to(n);
                    sleep(gap).await;
                    world.source.brings(n);
                    let brought = world.begin.elapsed();
                    if brought - revoked > SECOND {
                        late.push(revoked..brought + 2 * SECOND);
                    }
                }
                // The source is asked again after a second, and after two more: the next rotation comes after this one.
                sleep(SECOND * 5 / 2).await;
            }
            lies.abort();
        })
        .await;
        // On a machine that is starved, the new key itself may come too late for those who wait for it.
        assert!((late.len() as u64) < ROTATIONS / 4, "{order:?}, {kind:?}, {hostile:?}: no time to run: {late:?}");
        let (answered, mut failed) = (outcome.answered, outcome.failed);
        failed.retain(|(at, _)| !late.iter().any(|time| time.contains(at)));
        println!("{order:?}, {kind:?}, {hostile:?}: {answered} answered, {} failed, {} late", failed.len(), late.len());
        assert!(answered as u64 >= 5 * ROTATIONS, "{order:?}, {kind:?}, {hostile:?}: only {answered}");
        assert!(failed.is_empty(), "{order:?}, {kind:?}, {hostile:?}: {} of {answered}: {failed:?}", failed.len());
    }
}

/// A test for each order in paused time, and one in real time.
macro_rules! orders {
    ($($order:ident => $variant:ident with $kind:ident),*) => {
        $(mod $order {
            use super::*;

            #[tokio::test(start_paused = true)]
            async fn no_lie_fails_the_request_of_another() {
                rotate(Order::$variant, Kind::$kind, Network::Paused, 4 * SECOND).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            #[ignore = "takes minutes"]
            async fn no_lie_fails_the_request_of_another_in_real_time() {
                rotate(Order::$variant, Kind::$kind, Network::Real, SECOND / 10).await;
            }
        })*
    };
}

orders! {
    new_key_early => NewKeyEarly with HyperUtil,
    revoked_first => RevokedFirst with HyperUtil,
    both => Both with Reqwest
}
