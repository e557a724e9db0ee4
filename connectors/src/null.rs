//! The `discard` sink: counts rows and drops them, for benches and for trials of everything in front of it. The
//! engine calls it. The invariant: every row that arrives is in the counter of dropped rows, and nowhere else.

use std::sync::Arc;
use std::time::Duration;

use afferent_engine::component::{BuildContext, Delivery, Input, PlanContext, Planned, SinkConfig, SinkPlan};
use afferent_engine::{Batch, Epoch, Prepared, Rejected, Result, Sink};
use async_trait::async_trait;
use prometheus::IntCounter;
use schemars::JsonSchema;
use serde::Deserialize;

const COMMIT_INTERVAL: Duration = Duration::from_millis(50);

/// Counts rows and drops them. For measuring and trying out what stands in front of it: nothing is written
/// anywhere, and `afferent_dropped_rows_total{reason="discard"}` says how many rows came.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub struct DiscardConfig {}

impl SinkConfig for DiscardConfig {
    const NAME: &'static str = "discard";
    const EXAMPLE: &'static str = "discard: {}";

    fn plan(self, _: &[Input], _: &PlanContext) -> Planned<SinkPlan> {
        Ok(SinkPlan {
            delivery: Delivery::AtMostOnce("every row is counted and dropped, on purpose".to_owned()),
            commit_interval: COMMIT_INTERVAL,
            build: Arc::new(|context: &BuildContext| -> Result<Box<dyn Sink>> {
                Ok(Box::new(Discard { stage: context.stage.clone(), rows: 0, counter: context.dropped("discard") }))
            }),
        })
    }
}

struct Discard {
    stage: String,
    rows: u64,
    counter: IntCounter,
}

#[async_trait]
impl Sink for Discard {
    async fn open(&mut self, _: Option<(Epoch, &Prepared)>) -> Result<()> {
        Ok(())
    }

    async fn write(&mut self, _: usize, batch: Batch) -> Result<Vec<Rejected>> {
        self.rows += batch.rows() as u64;
        self.counter.inc_by(batch.rows() as u64);
        Ok(Vec::new())
    }

    async fn prepare(&mut self, _: Epoch) -> Result<(Prepared, Vec<Rejected>)> {
        Ok((Prepared::Null, Vec::new()))
    }

    async fn finish(&mut self, _: Epoch, _: &Prepared) -> Result<()> {
        Ok(())
    }

    fn commit_interval(&self) -> Duration {
        COMMIT_INTERVAL
    }

    async fn close(&mut self) -> Result<()> {
        tracing::info!(stage = self.stage, rows = self.rows, "rows counted and discarded");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use afferent_engine::metrics::Metrics;
    use arrow::array::{ArrayRef, Int32Array, RecordBatch};

    use super::*;

    #[tokio::test]
    async fn counts_what_it_drops() {
        let config: DiscardConfig = serde_json::from_str("{}").unwrap();
        let plan = config.plan(&[], &PlanContext::default()).unwrap();
        assert!(matches!(plan.delivery, Delivery::AtMostOnce(_)));
        let context = BuildContext {
            pipeline: "p".into(),
            stage: "s".into(),
            data_dir: ".".into(),
            run: 1,
            metrics: Metrics::new().unwrap().stage("p", "s"),
        };
        let mut sink = (plan.build)(&context).unwrap();
        sink.open(None).await.unwrap();
        for rows in [3, 0, 4] {
            let column = Arc::new(Int32Array::from(vec![7; rows])) as ArrayRef;
            let batch = RecordBatch::try_from_iter([("n", column)]).unwrap();
            assert!(sink.write(0, Batch::new(batch)).await.unwrap().is_empty());
        }
        let prepared = sink.prepare(Epoch::start(1).next()).await.unwrap().0;
        sink.finish(Epoch::start(1).next(), &prepared).await.unwrap();
        assert_eq!(context.dropped("discard").get(), 7);
    }

    #[test]
    fn takes_no_options() {
        assert!(serde_json::from_str::<DiscardConfig>(r#"{"rows":1}"#).is_err());
    }
}
