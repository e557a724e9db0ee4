//! The inputs of a stage: takes elements from whichever edge has some, in turn, and aligns barriers. Only
//! alignment ever stops the reading of an input.

use std::future::poll_fn;
use std::task::{Context, Poll};

use crate::batch::{Batch, Element};
use crate::edge::Receiver;
use crate::position::Epoch;

/// What reaches a stage.
#[derive(Debug)]
pub(crate) enum Arrival {
    /// Rows, with the number of the input.
    Batch(usize, Batch),
    /// The barrier has arrived on every input.
    Barrier(Epoch),
    /// Every input has ended.
    End,
}

/// All inputs of a stage.
pub(crate) struct Inputs {
    edges: Vec<Receiver>,
    /// The barrier has come on this input: what follows belongs to a later epoch and waits.
    aligned: Vec<bool>,
    ended: usize,
    /// Where the next look starts, so that no busy input starves the others.
    turn: usize,
    /// Planted fault: do not wait for the other inputs.
    overtaking: bool,
}

impl Inputs {
    pub(crate) fn new(edges: Vec<Receiver>, overtaking: bool) -> Self {
        Self { aligned: vec![false; edges.len()], edges, ended: 0, turn: 0, overtaking }
    }

    /// What comes next; `None` when a producer is gone, which only happens at teardown. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Option<Arrival> {
        // Edges know nothing of tokio's budget: without this, a stage that is never starved never yields.
        tokio::task::consume_budget().await;
        poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Arrival>> {
        for step in 0..self.edges.len() {
            let input = (self.turn + step) % self.edges.len();
            while !self.aligned[input] {
                match self.edges[input].poll_recv(cx) {
                    Poll::Pending => break,
                    Poll::Ready(None) => return Poll::Ready(None),
                    Poll::Ready(Some(Element::Batch(batch))) => {
                        self.turn = input + 1;
                        return Poll::Ready(Some(Arrival::Batch(input, batch)));
                    }
                    Poll::Ready(Some(Element::End)) => {
                        self.ended += 1;
                        if self.ended == self.edges.len() {
                            return Poll::Ready(Some(Arrival::End));
                        }
                    }
                    Poll::Ready(Some(Element::Barrier(epoch))) => {
                        if self.overtaking {
                            if input == 0 {
                                return Poll::Ready(Some(Arrival::Barrier(epoch)));
                            }
                            continue;
                        }
                        self.aligned[input] = true;
                        if self.aligned.iter().all(|aligned| *aligned) {
                            self.aligned.fill(false);
                            return Poll::Ready(Some(Arrival::Barrier(epoch)));
                        }
                    }
                }
            }
        }
        Poll::Pending
    }
}
