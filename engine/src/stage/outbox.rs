//! What a stage has still to send. Sending is split from producing so that a stage blocked by
//! backpressure can be cancelled, or serve commands, at any await without losing or doubling an element.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Context, Poll};
use std::time::Instant;

use prometheus::Counter;

use crate::batch::Element;
use crate::edge::{Disconnected, Sender};

/// The edges behind a stage and the elements on their way into them.
pub(crate) struct Outbox {
    edges: Vec<Sender>,
    pending: VecDeque<(usize, Option<Element>)>,
    waiting_since: Option<Instant>,
    send_wait: Counter,
}

impl Outbox {
    pub(crate) fn new(edges: Vec<Sender>, send_wait: Counter) -> Self {
        Self { edges, pending: VecDeque::new(), waiting_since: None, send_wait }
    }

    /// Queues an element for one edge.
    pub(crate) fn push(&mut self, edge: usize, element: Element) {
        self.pending.push_back((edge, Some(element)));
    }

    /// Queues a mark for every edge.
    pub(crate) fn broadcast(&mut self, mark: &Element) {
        for edge in 0..self.edges.len() {
            self.push(edge, mark.clone());
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// Sends everything, in order. Cancel-safe: what was sent is gone from the box, the rest stays.
    pub(crate) async fn flush(&mut self) -> Result<(), Disconnected> {
        if self.pending.is_empty() {
            return Ok(());
        }
        poll_fn(|cx| self.poll_flush(cx)).await
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Disconnected>> {
        while let Some((edge, slot)) = self.pending.front_mut() {
            match self.edges[*edge].poll_send(cx, slot) {
                Poll::Pending => {
                    self.waiting_since.get_or_insert_with(Instant::now);
                    return Poll::Pending;
                }
                Poll::Ready(sent) => {
                    if let Some(since) = self.waiting_since.take() {
                        self.send_wait.inc_by(since.elapsed().as_secs_f64());
                    }
                    sent?;
                    self.pending.pop_front();
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}
