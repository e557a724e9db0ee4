//! What the tests of the operators share: planning and building one from its configuration as JSON. Compiled for
//! tests only; the invariant: an operator under test is made the way the engine makes it.

use afferent_engine::component::{BuildContext, Input, OperatorBuild, OperatorConfig, OperatorPlan, PlanContext, Problem};
use afferent_engine::metrics::Metrics;
use afferent_engine::{Batch, Operator, Outputs};
use arrow::array::RecordBatch;
use arrow::compute::concat_batches;
use arrow::datatypes::SchemaRef;

/// Plans a configuration with one input, called `input`.
pub(crate) fn plan<C: OperatorConfig>(text: &str, schema: &SchemaRef) -> Result<OperatorPlan, Vec<Problem>> {
    let config: C = serde_json::from_str(text).expect("the configuration fits its struct");
    let input = Input { name: "input".to_owned(), schema: schema.clone() };
    config.plan(&[input], &PlanContext::default())
}

/// The problems of a configuration.
pub(crate) fn problems<C: OperatorConfig>(text: &str, schema: &SchemaRef) -> Vec<Problem> {
    plan::<C>(text, schema).err().expect("the configuration is refused")
}

/// A running operator, and the context it was built with (for its counters).
pub(crate) fn build(plan: &OperatorPlan) -> (Box<dyn Operator>, BuildContext) {
    let context = BuildContext {
        pipeline: "pipeline".to_owned(),
        stage: "stage".to_owned(),
        data_dir: std::path::PathBuf::new(),
        run: 1,
        metrics: Metrics::new().expect("metrics").stage("pipeline", "stage"),
    };
    let OperatorBuild::Compute { build, .. } = &plan.build else {
        panic!("the operator is asynchronous");
    };
    (build(&context).expect("the operator is built"), context)
}

/// Plans, builds and runs an operator over one batch, to the end of the input.
pub(crate) fn run<C: OperatorConfig>(text: &str, rows: RecordBatch) -> Outputs {
    let plan = match plan::<C>(text, &rows.schema()) {
        Ok(plan) => plan,
        Err(problems) => panic!("{problems:?}"),
    };
    let (mut operator, _) = build(&plan);
    let mut outputs = Outputs::new();
    operator.process(0, Batch::new(rows), &mut outputs).expect("processed");
    operator.finish(&mut outputs).expect("finished");
    outputs
}

/// All rows that left through `port`; none is `None`.
pub(crate) fn rows(outputs: &Outputs, port: usize) -> Option<RecordBatch> {
    let batches = outputs.batches().iter().filter(|(to, _)| *to == port);
    let batches: Vec<RecordBatch> = batches.map(|(_, batch)| batch.records().clone()).collect();
    let schema = batches.first()?.schema();
    Some(concat_batches(&schema, &batches).expect("batches of one schema"))
}
