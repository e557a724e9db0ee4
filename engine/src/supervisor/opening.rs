//! Tells when every source of a pipeline is open. The command asks, when it starts a pipeline that is to see from the
//! beginning what the next one sends. The invariant: a source is only watched, never changed.

use std::sync::Arc;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use super::{Options, Restore};
use crate::component::BuildContext;
use crate::error::Result;
use crate::graph::{Graph, Role};
use crate::position::Position;
use crate::source::{Pulled, Source};

/// The opening of a pipeline's sources.
#[derive(Debug)]
pub struct Opening(Vec<CancellationToken>);

impl Opening {
    /// Watches the sources of a graph that is run afterwards. Those that were read to their end before are not opened
    /// again, and not waited for.
    ///
    /// # Errors
    /// Fatal when the checkpoint store cannot be read.
    pub fn watch(graph: &mut Graph, options: &Options) -> Result<Self> {
        let stored = options.store.restored()?.sources;
        let mut watched = Vec::new();
        for node in &mut graph.nodes {
            let Role::Source(build) = &mut node.role else { continue };
            if options.restore != Restore::Fresh && stored.get(&node.name).is_some_and(|mark| mark.ended) {
                continue;
            }
            let opened = CancellationToken::new();
            watched.push(opened.clone());
            let plain = Arc::clone(build);
            *build = Arc::new(move |context: &BuildContext| -> Result<Box<dyn Source>> {
                Ok(Box::new(Watched { source: plain(context)?, opened: opened.clone() }))
            });
        }
        Ok(Self(watched))
    }

    /// Returns when every one of them has been open.
    pub async fn complete(&self) {
        for opened in &self.0 {
            opened.cancelled().await;
        }
    }
}

/// A source that says when it is open.
struct Watched {
    source: Box<dyn Source>,
    opened: CancellationToken,
}

#[async_trait]
impl Source for Watched {
    async fn open(&mut self, from: Option<&Position>) -> Result<()> {
        self.source.open(from).await?;
        self.opened.cancel();
        Ok(())
    }

    async fn next(&mut self) -> Result<Pulled> {
        self.source.next().await
    }

    fn position(&self) -> Position {
        self.source.position()
    }

    async fn commit(&mut self, position: &Position) -> Result<()> {
        self.source.commit(position).await
    }

    fn window_full(&self) -> bool {
        self.source.window_full()
    }

    async fn close(&mut self) {
        self.source.close().await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use tokio::time::{sleep, timeout};

    use super::*;
    use crate::assembly::Runtimes;
    use crate::checkpoint::Checkpoints;
    use crate::epoch::Ending;
    use crate::error::Error;
    use crate::graph::Node;
    use crate::metrics::Metrics;
    use crate::sabotage::Planted;
    use crate::supervisor::{RunError, run};
    use crate::testing::disk::Disk;

    /// Opens at the second attempt, once it may, and has nothing to say.
    struct Slow {
        may: Arc<AtomicBool>,
        refused: bool,
    }

    #[async_trait]
    impl Source for Slow {
        async fn open(&mut self, _: Option<&Position>) -> Result<()> {
            if !std::mem::replace(&mut self.refused, true) {
                return Err(Error::retry("not yet"));
            }
            while !self.may.load(Ordering::Acquire) {
                sleep(Duration::from_millis(10)).await;
            }
            Ok(())
        }

        async fn next(&mut self) -> Result<Pulled> {
            Ok(Pulled::End)
        }

        fn position(&self) -> Position {
            Position::of(&0)
        }

        async fn commit(&mut self, _: &Position) -> Result<()> {
            Ok(())
        }
    }

    fn graph(may: &Arc<AtomicBool>) -> Graph {
        let may = Arc::clone(may);
        let build = Arc::new(move |_: &BuildContext| -> Result<Box<dyn Source>> {
            Ok(Box::new(Slow { may: Arc::clone(&may), refused: false }))
        });
        let source =
            Node { name: "slow".into(), component: "test".into(), role: Role::Source(build), inputs: Vec::new(), fingerprint: 0 };
        Graph { name: "p".into(), nodes: vec![source], commit_interval: None }
    }

    #[tokio::test(start_paused = true)]
    async fn it_waits_for_the_source_and_not_for_one_that_has_ended() {
        let may = Arc::new(AtomicBool::new(false));
        let options = Options {
            store: Arc::new(Checkpoints::with_backend(Disk::new().backend()).unwrap()),
            data_dir: Default::default(),
            metrics: Metrics::new().unwrap(),
            runtimes: Runtimes::current(),
            drain: CancellationToken::new(),
            drain_limit: Duration::ZERO,
            dead_letters: None,
            restore: Restore::Strict,
            seed: 0,
            planted: Planted::default(),
            virtual_time: true,
        };
        let mut first = graph(&may);
        let opening = Opening::watch(&mut first, &options).unwrap();
        let (running, waiting) = (run(&first, &options), timeout(Duration::from_secs(5), opening.complete()));
        tokio::pin!(running, waiting);
        tokio::select! {
            biased;
            _ = &mut running => panic!("it ended before its source was open"),
            waited = &mut waiting => assert!(waited.is_err(), "it was told of too early"),
        }
        may.store(true, Ordering::Release);
        assert_eq!(running.await.unwrap(), Ending::Ended);
        timeout(Duration::from_secs(1), opening.complete()).await.unwrap();
        // At the second start nothing is opened.
        let mut second = graph(&may);
        let opening = Opening::watch(&mut second, &options).unwrap();
        timeout(Duration::from_secs(1), opening.complete()).await.unwrap();
        assert!(matches!(run(&second, &options).await, Err(RunError::AlreadyRead)));
    }
}
