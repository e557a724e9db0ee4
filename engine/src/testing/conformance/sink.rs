//! What every sink keeps across epochs and crashes. The invariant: as in the engine, an epoch counts as stored from
//! the moment it is prepared, and a new instance gets what was prepared for the newest one.

use arrow::array::RecordBatch;
use tokio::time::{sleep, timeout};

use super::{Broken, PATIENCE, PAUSE, TRIES, endless, later};
use crate::batch::Batch;
use crate::component::{BuildContext, SinkPlan};
use crate::error::Class;
use crate::position::Epoch;
use crate::rejected::Rejected;
use crate::sink::{Prepared, Sink};

/// A sink: through two epochs, a crash before the second is finished, one after rows that no epoch has, and a barrier
/// without rows. When it succeeds, readers must find every row of `input`; and each once, where the plan says
/// [`crate::component::Delivery::Once`]: the first batch is epoch one, the others are epoch two, and what was written
/// beside is undone. That is for the caller to look at, who knows how to read it.
///
/// # Errors
/// The rule that is broken.
pub async fn sink(plan: &SinkPlan, context: &BuildContext, input: &[RecordBatch]) -> Result<(), Broken> {
    let [one, two @ ..] = input else { return Err("two batches are needed to show anything".to_owned()) };
    if two.is_empty() {
        return Err("two batches are needed to show anything".to_owned());
    }
    let first_epoch = Epoch::start(context.run).next();
    let second_epoch = first_epoch.next();

    let mut first = open_sink(plan, context, None).await?;
    write(&mut *first, one).await?;
    let first_prepared = prepare(&mut *first, first_epoch).await?;
    for batch in two {
        write(&mut *first, batch).await?;
    }
    let second_prepared = prepare(&mut *first, second_epoch).await?;
    finish(&mut *first, first_epoch, &first_prepared).await?;
    // A crash: the second epoch is stored, and not finished.
    drop(first);

    let last = Some((second_epoch, &second_prepared));
    let context = later(context);
    let second = open_sink(plan, &context, last).await?;
    drop(second);
    // Finishing it again changes nothing; and these rows belong to no stored epoch.
    let context = later(&context);
    let mut third = open_sink(plan, &context, last).await?;
    write(&mut *third, one).await?;
    drop(third);

    let context = later(&context);
    let mut fourth = open_sink(plan, &context, last).await?;
    let mut epoch = Epoch::start(context.run);
    for _ in 0..2 {
        epoch = epoch.next();
        let prepared = prepare(&mut *fourth, epoch).await?;
        finish(&mut *fourth, epoch, &prepared).await?;
    }
    timeout(PATIENCE, fourth.close()).await.map_err(|_| endless("closing"))?.map_err(|e| format!("closing: {e}"))
}

async fn open_sink(plan: &SinkPlan, context: &BuildContext, last: Option<(Epoch, &Prepared)>) -> Result<Box<dyn Sink>, Broken> {
    let mut sink = (plan.build)(context).map_err(|e| format!("building: {e}"))?;
    for _ in 0..TRIES {
        match timeout(PATIENCE, sink.open(last)).await.map_err(|_| endless("opening"))? {
            Ok(()) => return Ok(sink),
            Err(error) if error.class() == Class::Retry => sleep(PAUSE).await,
            Err(error) => return Err(format!("opening after {last:?}: {error}")),
        }
    }
    Err(format!("opening after {last:?} fails {TRIES} times"))
}

async fn write(sink: &mut dyn Sink, rows: &RecordBatch) -> Result<(), Broken> {
    for _ in 0..TRIES {
        match timeout(PATIENCE, sink.write(0, Batch::new(rows.clone()))).await.map_err(|_| endless("writing"))? {
            Ok(rejected) => return none_rejected(&rejected),
            Err(error) if error.class() == Class::Retry => sleep(PAUSE).await,
            Err(error) => return Err(format!("writing: {error}")),
        }
    }
    Err(format!("writing fails {TRIES} times"))
}

async fn prepare(sink: &mut dyn Sink, epoch: Epoch) -> Result<Prepared, Broken> {
    for _ in 0..TRIES {
        match timeout(PATIENCE, sink.prepare(epoch)).await.map_err(|_| endless("preparing"))? {
            Ok((prepared, rejected)) => return none_rejected(&rejected).map(|()| prepared),
            Err(error) if error.class() == Class::Retry => sleep(PAUSE).await,
            Err(error) => return Err(format!("preparing epoch {epoch}: {error}")),
        }
    }
    Err(format!("preparing epoch {epoch} fails {TRIES} times"))
}

async fn finish(sink: &mut dyn Sink, epoch: Epoch, prepared: &Prepared) -> Result<(), Broken> {
    for _ in 0..TRIES {
        match timeout(PATIENCE, sink.finish(epoch, prepared)).await.map_err(|_| endless("finishing"))? {
            Ok(()) => return Ok(()),
            Err(error) if error.class() == Class::Retry => sleep(PAUSE).await,
            Err(error) => return Err(format!("finishing epoch {epoch}: {error}")),
        }
    }
    Err(format!("finishing epoch {epoch} fails {TRIES} times"))
}

fn none_rejected(rejected: &[Rejected]) -> Result<(), Broken> {
    if rejected.is_empty() { Ok(()) } else { Err(format!("rows are refused that it should take: {rejected:?}")) }
}
