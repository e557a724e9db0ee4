//! An edge: a queue with one producer and one consumer, bounded by rows and bytes. Backpressure is its
//! refusal to take more; marks (barriers, end) always enter, since the number of epochs in flight bounds them.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures::task::AtomicWaker;
use prometheus::IntCounter;

use crate::batch::{Batch, Element};
use crate::graph::{Overflow, QueueLimit};
use crate::metrics::{QueueFill, StageMetrics};

/// Makes an edge in front of the stage that `consumer` measures.
pub(crate) fn edge(limit: QueueLimit, overflow: Overflow, consumer: &StageMetrics) -> (Sender, Receiver) {
    let shared = Arc::new(Shared {
        queue: Mutex::default(),
        limit,
        overflow,
        readable: AtomicWaker::new(),
        writable: AtomicWaker::new(),
        dropped: (overflow != Overflow::Block).then(|| consumer.dropped("overflow")),
        metrics: consumer.clone(),
        fill: consumer.queue(),
    });
    (Sender(Arc::clone(&shared)), Receiver(shared))
}

#[derive(Default)]
struct Queue {
    elements: VecDeque<Element>,
    rows: usize,
    bytes: usize,
    batches: usize,
    sender_gone: bool,
    receiver_gone: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    limit: QueueLimit,
    overflow: Overflow,
    readable: AtomicWaker,
    writable: AtomicWaker,
    dropped: Option<IntCounter>,
    metrics: StageMetrics,
    fill: QueueFill,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // The queue's counts and elements change together under the lock and nothing in between can
        // panic, so a poisoned lock still guards a sound queue.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fits(&self, queue: &Queue, batch: &Batch) -> bool {
        queue.batches == 0 || (queue.rows + batch.rows() <= self.limit.rows && queue.bytes + batch.bytes() <= self.limit.bytes)
    }

    fn enter(&self, queue: &mut Queue, element: Element) {
        if let Element::Batch(batch) = &element {
            queue.rows += batch.rows();
            queue.bytes += batch.bytes();
            queue.batches += 1;
            self.measure(queue, batch.rows() as f64, batch.bytes() as f64);
        }
        queue.elements.push_back(element);
    }

    fn leave(&self, queue: &mut Queue, batch: &Batch) {
        queue.rows -= batch.rows();
        queue.bytes -= batch.bytes();
        queue.batches -= 1;
        self.measure(queue, -(batch.rows() as f64), -(batch.bytes() as f64));
    }

    fn measure(&self, queue: &Queue, rows: f64, bytes: f64) {
        self.metrics.queue_rows.add(rows);
        self.metrics.queue_bytes.add(bytes);
        let fill = (queue.rows as f64 / self.limit.rows.max(1) as f64).max(queue.bytes as f64 / self.limit.bytes.max(1) as f64);
        self.fill.set(fill.min(1.0));
    }

    /// Makes room by dropping the oldest batches; marks stay where they are.
    fn drop_oldest(&self, queue: &mut Queue, arriving: &Batch) {
        while !self.fits(queue, arriving) {
            let oldest = queue.elements.iter().position(|element| matches!(element, Element::Batch(_)));
            let Some(Element::Batch(batch)) = oldest.and_then(|at| queue.elements.remove(at)) else { return };
            self.leave(queue, &batch);
            self.count_dropped(&batch);
        }
    }

    fn count_dropped(&self, batch: &Batch) {
        if let Some(dropped) = &self.dropped {
            dropped.inc_by(batch.rows() as u64);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let queue = self.queue.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.metrics.queue_rows.sub(queue.rows as f64);
        self.metrics.queue_bytes.sub(queue.bytes as f64);
        self.fill.set(0.0);
    }
}

/// The other end of the edge is gone: the pipeline is being torn down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Disconnected;

/// The producer's end.
pub(crate) struct Sender(Arc<Shared>);

impl Sender {
    /// Takes the element out of `slot` and queues it, or waits for room.
    pub(crate) fn poll_send(&self, cx: &mut Context<'_>, slot: &mut Option<Element>) -> Poll<Result<(), Disconnected>> {
        let mut queue = self.0.lock();
        if queue.receiver_gone {
            return Poll::Ready(Err(Disconnected));
        }
        let Some(element) = slot.take() else { return Poll::Ready(Ok(())) };
        if let Element::Batch(batch) = &element
            && !self.0.fits(&queue, batch)
        {
            match self.0.overflow {
                Overflow::DropOldest => self.0.drop_oldest(&mut queue, batch),
                Overflow::DropNewest => {
                    self.0.count_dropped(batch);
                    return Poll::Ready(Ok(()));
                }
                Overflow::Block => {
                    *slot = Some(element);
                    self.0.writable.register(cx.waker());
                    return Poll::Pending;
                }
            }
        }
        self.0.enter(&mut queue, element);
        drop(queue);
        self.0.readable.wake();
        Poll::Ready(Ok(()))
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.0.lock().sender_gone = true;
        self.0.readable.wake();
    }
}

/// The consumer's end.
pub(crate) struct Receiver(Arc<Shared>);

impl Receiver {
    /// The next element; `None` once the producer is gone and the queue is empty.
    pub(crate) fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<Element>> {
        let mut queue = self.0.lock();
        match queue.elements.pop_front() {
            Some(element) => {
                if let Element::Batch(batch) = &element {
                    self.0.leave(&mut queue, batch);
                }
                drop(queue);
                self.0.writable.wake();
                Poll::Ready(Some(element))
            }
            None if queue.sender_gone => Poll::Ready(None),
            None => {
                // Registered under the lock: the producer wakes after it has released the same lock.
                self.0.readable.register(cx.waker());
                Poll::Pending
            }
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.0.lock().receiver_gone = true;
        self.0.writable.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc as StdArc;

    use arrow::array::{ArrayRef, Int32Array, RecordBatch};
    use futures::task::noop_waker;

    use super::*;
    use crate::metrics::Metrics;
    use crate::position::Epoch;

    fn batch(rows: usize) -> Element {
        let column: ArrayRef = StdArc::new(Int32Array::from(vec![7; rows]));
        Element::Batch(Batch::new(RecordBatch::try_from_iter([("n", column)]).unwrap()))
    }

    fn send(sender: &Sender, element: Element) -> bool {
        let waker = noop_waker();
        let mut slot = Some(element);
        sender.poll_send(&mut Context::from_waker(&waker), &mut slot).is_ready()
    }

    fn recv(receiver: &mut Receiver) -> Option<Element> {
        let waker = noop_waker();
        match receiver.poll_recv(&mut Context::from_waker(&waker)) {
            Poll::Ready(element) => element,
            Poll::Pending => None,
        }
    }

    fn rows(element: Option<Element>) -> usize {
        match element {
            Some(Element::Batch(batch)) => batch.rows(),
            other => panic!("expected a batch, got {other:?}"),
        }
    }

    fn make(limit: QueueLimit, overflow: Overflow) -> (Sender, Receiver, StageMetrics) {
        let metrics = Metrics::new().unwrap().stage("p", "s");
        let (sender, receiver) = edge(limit, overflow, &metrics);
        (sender, receiver, metrics)
    }

    #[test]
    fn a_stalled_consumer_lets_exactly_the_limit_through() {
        let (sender, mut receiver, metrics) = make(QueueLimit { rows: 10, bytes: 1 << 20 }, Overflow::Block);
        let admitted = (0..20).take_while(|_| send(&sender, batch(3))).count();
        assert_eq!(admitted, 3, "3 x 3 rows fit into 10, a fourth batch does not");
        assert_eq!(metrics.queue_rows.get(), 9.0);
        assert!(send(&sender, Element::Barrier(Epoch::start(1))), "a barrier enters a full edge");
        assert_eq!(rows(recv(&mut receiver)), 3);
        assert!(send(&sender, batch(3)));
    }

    #[test]
    fn bytes_bound_it_too_and_a_giant_enters_an_empty_edge() {
        let (sender, mut receiver, _) = make(QueueLimit { rows: 1 << 20, bytes: 400 }, Overflow::Block);
        assert!(send(&sender, batch(1000)));
        assert!(!send(&sender, batch(1)));
        assert_eq!(rows(recv(&mut receiver)), 1000);
        assert!(send(&sender, batch(1)));
    }

    #[test]
    fn drop_oldest_keeps_the_newest_and_every_mark_and_counts() {
        let (sender, mut receiver, metrics) = make(QueueLimit { rows: 4, bytes: 1 << 20 }, Overflow::DropOldest);
        assert!(send(&sender, batch(2)));
        assert!(send(&sender, Element::Barrier(Epoch::start(1))));
        assert!(send(&sender, batch(2)));
        assert!(send(&sender, batch(1)));
        assert!(matches!(recv(&mut receiver), Some(Element::Barrier(_))));
        assert_eq!(rows(recv(&mut receiver)), 2);
        assert_eq!(rows(recv(&mut receiver)), 1);
        assert_eq!(metrics.dropped("overflow").get(), 2);
    }

    #[test]
    fn drop_newest_refuses_what_arrives_and_counts() {
        let (sender, mut receiver, metrics) = make(QueueLimit { rows: 4, bytes: 1 << 20 }, Overflow::DropNewest);
        assert!(send(&sender, batch(4)));
        assert!(send(&sender, batch(3)));
        assert_eq!(rows(recv(&mut receiver)), 4);
        assert!(recv(&mut receiver).is_none());
        assert_eq!(metrics.dropped("overflow").get(), 3);
    }

    #[test]
    fn the_fill_of_a_stage_is_that_of_its_fullest_input() {
        let metrics = Metrics::new().unwrap().stage("p", "s");
        let limit = QueueLimit { rows: 10, bytes: 1 << 20 };
        let ((full, mut behind_full), (idle, mut behind_idle)) =
            (edge(limit, Overflow::Block, &metrics), edge(limit, Overflow::Block, &metrics));
        assert!(send(&full, batch(9)));
        assert!(send(&idle, batch(1)));
        assert_eq!(metrics.queue_fill.get(), 0.9, "what was measured last is not what counts");
        recv(&mut behind_idle);
        assert_eq!(metrics.queue_fill.get(), 0.9);
        assert!(send(&idle, batch(2)));
        recv(&mut behind_full);
        assert_eq!(metrics.queue_fill.get(), 0.2);
        drop((idle, behind_idle));
        assert_eq!(metrics.queue_fill.get(), 0.0);
    }
}
