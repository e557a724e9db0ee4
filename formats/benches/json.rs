//! JSON messages to Arrow: our decoder against arrow-json's own reader on the same messages, one core, both
//! in one run. The messages are those of the other benchmarks: 200 bytes, nine sensor values and two texts.
//!
//! `cargo bench -p afferent-formats --bench json`
#![expect(clippy::expect_used, clippy::print_stdout, reason = "a benchmark prints, and ends when it cannot go on")]

use std::sync::Arc;
use std::time::Instant;

use afferent_formats::{Decoder, Format, Limits, Policy};
use arrow::array::BinaryArray;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::json::ReaderBuilder;

fn schema() -> SchemaRef {
    let mut fields: Vec<Field> = (1..=9).map(|n| Field::new(format!("s{n}"), DataType::Float32, true)).collect();
    fields.insert(0, Field::new("reading", DataType::Int64, true));
    fields.push(Field::new("device", DataType::Utf8, true));
    fields.push(Field::new("unit", DataType::Utf8, true));
    Arc::new(Schema::new(fields))
}

fn messages(rows: usize) -> Vec<String> {
    let mut random = fastrand::Rng::with_seed(1);
    (0..rows)
        .map(|row| {
            let values: String = (1..=9).map(|n| format!("\"s{n}\":{:.3},", random.f64() * 100.0)).collect();
            format!("{{\"reading\":{row},{values}\"device\":\"shuttle-{}\",\"unit\":\"bar per second\"}}", row % 40)
        })
        .collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    const RUNS: usize = 15;
    let schema = schema();
    for rows in [1, 32, 256, 1024] {
        let messages = messages(rows);
        let bytes: usize = messages.iter().map(String::len).sum();
        let payloads = BinaryArray::from_iter_values(&messages);
        let repeats = (200_000 / rows).max(1);
        let mut ours = Decoder::new(Format::Json, Arc::clone(&schema), Policy::default(), Limits::default()).expect("a decoder");
        let (mut own, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..RUNS {
            let began = Instant::now();
            for _ in 0..repeats {
                let decoded = ours.decode(&payloads).expect("decodes");
                assert_eq!(decoded.batch.num_rows(), rows);
            }
            let us = began.elapsed().as_secs_f64();
            let mut reader = ReaderBuilder::new(Arc::clone(&schema)).with_batch_size(rows).build_decoder().expect("a reader");
            let began = Instant::now();
            for _ in 0..repeats {
                for payload in payloads.iter().flatten() {
                    reader.decode(payload).expect("decodes");
                }
                let batch = reader.flush().expect("flushes").expect("rows");
                assert_eq!(batch.num_rows(), rows);
            }
            let them = began.elapsed().as_secs_f64();
            own.push(us);
            theirs.push(them);
            ratios.push(them / us);
        }
        let per = |seconds: f64| seconds / (repeats * rows) as f64 * 1e6;
        println!(
            "{rows:>5} messages of {:.0} bytes: ours {:.3} us a message, arrow-json {:.3} us; ratio of rates, median of {RUNS} pairs: {:.2}",
            bytes as f64 / rows as f64,
            per(median(own)),
            per(median(theirs)),
            median(ratios)
        );
    }
}
