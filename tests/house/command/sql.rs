//! `afferent sql` as its users meet it: formats, what it says of what is missing, and that it only reads.

use std::io::{Cursor, Write};
use std::process::Stdio;

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::Int64Type;
use arrow::ipc::reader::StreamReader;

use super::{PAIRS, fails, stdout};
use crate::tools::{Scratch, succeed, told};

#[test]
fn sql_shows_rows_in_four_formats() {
    let scratch = Scratch::new();
    scratch.run(&[&scratch.write("pairs.yaml", PAIRS)]);
    let query = "select count(*) as n, max(id) as id from pairs";
    let shown = |format: &str| succeed(scratch.afferent("sql").args(["--format", format, "-c", query])).stdout;
    let text = |format: &str| String::from_utf8(shown(format)).unwrap();
    assert_eq!(text("csv"), "n,id\n50,99\n");
    assert_eq!(text("json"), "{\"n\":50,\"id\":99}\n");
    assert!(text("table").contains("| 50 | 99 |"), "{}", text("table"));
    let batches: Vec<RecordBatch> =
        StreamReader::try_new(Cursor::new(shown("arrow")), None).unwrap().map(Result::unwrap).collect();
    assert_eq!(batches[0].column_by_name("id").unwrap().as_primitive::<Int64Type>().value(0), 99);
    // Whoever reads a pipe gets CSV; without rows still the header, or no line at all.
    assert_eq!(stdout(scratch.afferent("sql").args(["-c", query])), "n,id\n50,99\n");
    let none = "select id from pairs where id < 0";
    assert_eq!(stdout(scratch.afferent("sql").args(["--format", "csv", "-c", none])), "id\n");
    assert_eq!(stdout(scratch.afferent("sql").args(["--format", "json", "-c", none])), "");
}

#[test]
fn sql_says_what_is_missing() {
    let scratch = Scratch::new();
    let text = fails(scratch.afferent("sql").args(["-c", "select 1"]));
    assert!(text.contains("there is no data directory") && text.contains("--data-dir"), "{text}");
    assert!(!scratch.data_dir().exists(), "reading makes no folders");
    std::fs::create_dir(scratch.data_dir()).unwrap();
    let text = fails(scratch.afferent("sql").args(["-c", "select * from pairs"]));
    assert!(text.contains("pairs") && text.contains("there are no tables in"), "{text}");
    scratch.run(&[&scratch.write("pairs.yaml", PAIRS)]);
    let text = fails(scratch.afferent("sql").args(["-c", "select * from pears"]));
    assert!(text.contains("pears") && text.contains("tables: pairs"), "{text}");
    let text = fails(scratch.afferent("sql").args(["-c", "selec 1"]));
    assert!(text.contains("selec") && text.contains("Column: 1"), "{text}");
}

#[test]
fn sql_lists_the_tables_of_the_user_and_changes_none() {
    let scratch = Scratch::new();
    scratch.run(&[&scratch.write("pairs.yaml", PAIRS)]);
    assert_eq!(scratch.sql("show tables"), "table_name\npairs\n");
    // Nothing was rejected, which is an answer and no error.
    assert_eq!(scratch.number("select count(*) from dead_letters where reason <> ''"), 0);
    for statement in [
        "insert into pairs values (1, 1)",
        "drop table pairs",
        "create table more as select 1 as n",
        "copy (select 1 as n) to 'copied.csv'",
        "set datafusion.execution.batch_size = 1",
    ] {
        let text = fails(scratch.afferent("sql").args(["-c", statement]));
        assert!(text.contains("this is for reading"), "{statement}: {text}");
    }
    assert!(!scratch.path("copied.csv").exists());
    assert_eq!(scratch.number("select count(*) from pairs"), 50);
    for statement in ["describe pairs", "explain select * from pairs", "show columns from pairs"] {
        succeed(scratch.afferent("sql").args(["-c", statement]));
    }
}

#[test]
fn statements_come_from_a_pipe_with_or_without_a_last_semicolon() {
    let scratch = Scratch::new();
    scratch.run(&[&scratch.write("pairs.yaml", PAIRS)]);
    let mut child = scratch
        .afferent("sql")
        .args(["--format", "csv"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"show tables\nselect count(*) as n\nfrom pairs;\nselect 7 as seven\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "table_name\npairs\nn\n50\nseven\n7\n", "{}", told(&output));
}
