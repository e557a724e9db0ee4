//! The running `llm` operator: the rows of a batch are asked about side by side, and leave in their order with the
//! answer or the reason why there is none. The engine overlaps batches; all of them together have no more requests
//! under way than the stage allows. Invariant: every row that arrives leaves once, whatever the provider does.

use std::num::NonZeroUsize;
use std::sync::Arc;

use afferent_engine::batch::Batch;
use afferent_engine::operator::{AsyncOperator, Outputs};
use afferent_engine::{Error, Result};
use arrow::array::{RecordBatch, RecordBatchOptions, StringArray};
use arrow::datatypes::SchemaRef;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream;
use serde_json::{Map, Value, json};
use tokio::sync::Semaphore;

use super::answer::Answer;
use super::client::ChatClient;
use super::config::{LlmConfig, ResponseFormat};
use super::prompt::Prompt;

/// What all requests of a stage have in common. Cloning shares it.
#[derive(Clone)]
pub(super) struct Question {
    frame: Arc<Map<String, Value>>,
    system: Option<Arc<str>>,
}

impl Question {
    /// The requests of a configuration; `schema` is the JSON Schema of the answer.
    pub(super) fn new(config: &LlmConfig, schema: Value) -> Self {
        let mut frame = Map::new();
        frame.insert("model".to_owned(), json!(config.model));
        frame.insert("temperature".to_owned(), json!(config.temperature));
        frame.insert("max_tokens".to_owned(), json!(config.max_tokens));
        let format = match config.response_format {
            ResponseFormat::JsonSchema => {
                Some(json!({ "type": "json_schema", "json_schema": { "name": "answer", "schema": schema, "strict": true } }))
            }
            ResponseFormat::JsonObjectSchema => Some(json!({ "type": "json_object", "schema": schema })),
            ResponseFormat::JsonObject => Some(json!({ "type": "json_object" })),
            ResponseFormat::None => None,
        };
        frame.extend(format.map(|format| ("response_format".to_owned(), format)));
        Self { frame: Arc::new(frame), system: config.system.as_deref().map(Arc::from) }
    }

    /// The body of the request with this prompt.
    fn request(&self, prompt: &str) -> Value {
        let system = self.system.as_ref().map(|text| json!({ "role": "system", "content": &**text }));
        let messages: Vec<Value> = system.into_iter().chain([json!({ "role": "user", "content": prompt })]).collect();
        let mut request = (*self.frame).clone();
        request.insert("messages".to_owned(), Value::Array(messages));
        Value::Object(request)
    }
}

/// The operator.
pub(super) struct Llm {
    shared: Arc<Shared>,
}

struct Shared {
    stage: String,
    client: ChatClient,
    prompt: Prompt,
    answer: Answer,
    question: Question,
    schema: SchemaRef,
    concurrency: NonZeroUsize,
    /// One permit a request, for all batches of the stage.
    under_way: Semaphore,
}

impl Llm {
    /// An operator that asks `client`; `schema` is what leaves.
    pub(super) fn new(
        stage: String,
        client: ChatClient,
        prompt: Prompt,
        answer: Answer,
        question: Question,
        schema: SchemaRef,
        concurrency: NonZeroUsize,
    ) -> Self {
        let under_way = Semaphore::new(concurrency.get().min(Semaphore::MAX_PERMITS));
        Self { shared: Arc::new(Shared { stage, client, prompt, answer, question, schema, concurrency, under_way }) }
    }
}

impl AsyncOperator for Llm {
    fn call(&self, batch: Batch) -> BoxFuture<'static, Result<Outputs>> {
        Box::pin(process(Arc::clone(&self.shared), batch))
    }

    fn concurrency(&self) -> usize {
        self.shared.concurrency.get()
    }
}

async fn process(shared: Arc<Shared>, batch: Batch) -> Result<Outputs> {
    let prompts = shared.prompt.render(batch.records())?;
    let asked = prompts.into_iter().map(|prompt| ask(Arc::clone(&shared), prompt));
    let answers: Vec<std::result::Result<String, String>> =
        stream::iter(asked).buffered(shared.concurrency.get()).collect().await;
    let (columns, reasons) = shared.answer.columns(answers)?;
    if let Some(reason) = reasons.iter().flatten().next() {
        let failed = reasons.iter().flatten().count();
        tracing::warn!(stage = %shared.stage, failed, rows = reasons.len(), reason, "rows without an answer of the language model");
    }
    let records = batch.records();
    let mut all = records.columns().to_vec();
    all.extend(columns);
    all.push(Arc::new(reasons.into_iter().collect::<StringArray>()));
    let options = RecordBatchOptions::new().with_row_count(Some(records.num_rows()));
    let records = RecordBatch::try_new_with_options(Arc::clone(&shared.schema), all, &options).map_err(Error::fatal)?;
    let mut outputs = Outputs::new();
    outputs.emit(batch.derive(records));
    Ok(outputs)
}

/// One row. Waiting for one's turn does not count against the deadline: it says nothing about the provider.
async fn ask(shared: Arc<Shared>, prompt: std::result::Result<String, String>) -> std::result::Result<String, String> {
    let request = shared.question.request(&prompt?);
    let _turn = shared.under_way.acquire().await.map_err(|_| "the stage is closing".to_owned())?;
    shared.client.complete(&request).await
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use afferent_engine::component::{BuildContext, Input, OperatorBuild, OperatorConfig, PlanContext};
    use afferent_engine::metrics::Metrics;
    use arrow::array::{Array, ArrayRef, AsArray, Int64Array};
    use arrow::datatypes::Int8Type;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::Barrier;

    use super::*;

    /// A provider that answers each request with the HTTP response that the test makes of its number and body.
    struct Provider {
        url: String,
        /// Head and body of every request.
        requests: Arc<Mutex<Vec<(String, Value)>>>,
    }

    impl Provider {
        fn calls(&self) -> usize {
            self.requests.lock().unwrap().len()
        }
    }

    async fn provider<R>(respond: impl Fn(usize, Value) -> R + Send + Sync + 'static) -> Provider
    where
        R: Future<Output = String> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v1/", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (seen, respond) = (Arc::clone(&requests), Arc::new(respond));
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                let (seen, respond) = (Arc::clone(&seen), Arc::clone(&respond));
                tokio::spawn(async move {
                    let Some((head, body)) = read_request(&mut socket).await else { return };
                    let number = {
                        let mut seen = seen.lock().unwrap();
                        seen.push((head, body.clone()));
                        seen.len() - 1
                    };
                    let response = respond(number, body).await;
                    let _ = socket.write_all(response.as_bytes()).await;
                });
            }
        });
        Provider { url, requests }
    }

    async fn read_request(socket: &mut TcpStream) -> Option<(String, Value)> {
        let mut bytes = Vec::new();
        loop {
            if socket.read_buf(&mut bytes).await.ok()? == 0 {
                return None;
            }
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            let head = head.to_lowercase();
            let length: usize = head.lines().find_map(|line| line.strip_prefix("content-length: "))?.parse().ok()?;
            if body.len() >= length {
                return Some((head, serde_json::from_str(body).ok()?));
            }
        }
    }

    fn response(status: &str, header: &str, body: &str) -> String {
        format!("HTTP/1.1 {status}\r\n{header}content-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
    }

    fn says(content: &str) -> String {
        let body = json!({ "choices": [{ "message": { "role": "assistant", "content": content }, "finish_reason": "stop" }] });
        response("200 OK", "", &body.to_string())
    }

    /// The number that the prompt ends with.
    fn number_in(request: &Value) -> i64 {
        let prompt = request["messages"].as_array().unwrap().last().unwrap()["content"].as_str().unwrap();
        prompt.rsplit(' ').next().unwrap().parse().unwrap()
    }

    fn urgent(request: &Value) -> String {
        let number = number_in(request);
        says(&json!({ "summary": format!("row {number}"), "urgency": number }).to_string())
    }

    fn operator(url: &str, more: &str) -> Arc<dyn AsyncOperator> {
        let text = format!(
            r#"{{"url":"{url}","model":"m","prompt":{{"template":"how urgent is {{{{ n }}}}"}},
                "output":{{"summary":"utf8","urgency":"int8"}},"deadline":"10s"{more}}}"#
        );
        let config: LlmConfig = serde_json::from_str(&text).unwrap();
        let plan = config.plan(&[Input { name: "rows".into(), schema: rows(0..1).schema() }], &PlanContext::default()).unwrap();
        let context = BuildContext {
            pipeline: "p".into(),
            stage: "s".into(),
            data_dir: std::path::PathBuf::new(),
            run: 1,
            metrics: Metrics::new().unwrap().stage("p", "s"),
        };
        let OperatorBuild::Async(build) = plan.build else { panic!("llm waits for others") };
        build(&context).unwrap()
    }

    fn rows(numbers: std::ops::Range<i64>) -> RecordBatch {
        RecordBatch::try_from_iter([("n", Arc::new(Int64Array::from_iter_values(numbers)) as ArrayRef)]).unwrap()
    }

    async fn answered(operator: &dyn AsyncOperator, records: RecordBatch) -> RecordBatch {
        let outputs = operator.call(Batch::new(records)).await.unwrap();
        assert!(outputs.rejected().is_empty());
        outputs.batches()[0].1.records().clone()
    }

    fn urgencies(records: &RecordBatch) -> Vec<Option<i8>> {
        records.column(2).as_primitive::<Int8Type>().iter().collect()
    }

    fn reason(records: &RecordBatch, row: usize) -> &str {
        let reasons = records.column(3).as_string::<i32>();
        if reasons.is_null(row) { "" } else { reasons.value(row) }
    }

    #[tokio::test]
    async fn rows_are_asked_side_by_side_and_leave_in_order() {
        // Nobody is answered before four are there, and never are there more: two batches share one limit.
        let (together, here, most) = (Arc::new(Barrier::new(4)), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let highest = Arc::clone(&most);
        let provider = provider(move |_, body| {
            let (together, here, most) = (Arc::clone(&together), Arc::clone(&here), Arc::clone(&most));
            async move {
                most.fetch_max(here.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                together.wait().await;
                here.fetch_sub(1, Ordering::SeqCst);
                urgent(&body)
            }
        })
        .await;
        let operator = operator(&provider.url, r#","concurrency":4"#);
        assert_eq!(operator.concurrency(), 4);
        let (first, second) = tokio::join!(answered(&*operator, rows(0..6)), answered(&*operator, rows(6..12)));
        assert_eq!(urgencies(&first), (0..6).map(Some).collect::<Vec<_>>());
        assert_eq!(urgencies(&second), (6..12).map(Some).collect::<Vec<_>>());
        assert_eq!(first.column(1).as_string::<i32>().value(5), "row 5");
        assert_eq!(first.column(3).null_count(), 6);
        assert_eq!((provider.calls(), highest.load(Ordering::SeqCst)), (12, 4));
    }

    #[tokio::test]
    async fn the_request_is_of_the_wire_format() {
        let provider = provider(|_, body| async move { urgent(&body) }).await;
        let operator = operator(&provider.url, r#","api_key":"k-1","system":"be brief","max_tokens":9"#);
        answered(&*operator, rows(3..4)).await;
        let (head, body) = provider.requests.lock().unwrap()[0].clone();
        assert!(head.starts_with("post /v1/chat/completions http/1.1") && head.contains("authorization: bearer k-1"), "{head}");
        assert_eq!((body["model"].as_str(), body["max_tokens"].as_u64()), (Some("m"), Some(9)));
        assert_eq!(body["messages"][0], json!({ "role": "system", "content": "be brief" }));
        assert_eq!(body["messages"][1], json!({ "role": "user", "content": "how urgent is 3" }));
        assert_eq!(body["response_format"]["json_schema"]["schema"]["properties"]["urgency"]["type"], "integer");
        assert_eq!(body["response_format"]["json_schema"]["strict"], true);
    }

    #[tokio::test]
    async fn an_overloaded_provider_is_asked_again_and_a_refusing_one_is_not() {
        let provider = provider(|number, body| async move {
            match (number_in(&body), number) {
                (1, _) => response("400 Bad Request", "", "{\"error\":\"no such model\"}"),
                (2, _) => response("503 Service Unavailable", "retry-after: 3600\r\n", "later"),
                (0, 0) => response("429 Too Many Requests", "retry-after: 0\r\n", "slow down"),
                (0, 1) => response("500 Internal Server Error", "retry-after: 0\r\n", "oops"),
                _ => urgent(&body),
            }
        })
        .await;
        let operator = operator(&provider.url, r#","concurrency":1"#);
        let left = answered(&*operator, rows(0..4)).await;
        assert_eq!(urgencies(&left), [Some(0), None, None, Some(3)]);
        assert_eq!(reason(&left, 1), "the provider says 400 Bad Request: \"{\\\"error\\\":\\\"no such model\\\"}\"");
        assert!(reason(&left, 2).ends_with("the next attempt would be past the deadline of 10s"), "{}", reason(&left, 2));
        assert_eq!(provider.calls(), 3 + 1 + 1 + 1);
    }

    #[tokio::test]
    async fn attempts_end() {
        let provider = provider(|_, _| async { response("502 Bad Gateway", "retry-after: 0\r\n", "") }).await;
        let left = answered(&*operator(&provider.url, r#","retries":1"#), rows(0..1)).await;
        assert_eq!(reason(&left, 0), "the provider says 502 Bad Gateway: \"\" (after 2 attempts)");
        assert_eq!(provider.calls(), 2);
    }

    #[tokio::test]
    async fn a_provider_that_is_down_or_silent_stops_nothing() {
        let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v1", nobody.local_addr().unwrap());
        drop(nobody);
        let left = answered(&*operator(&url, r#","retries":0"#), rows(0..2)).await;
        assert_eq!(left.num_rows(), 2);
        assert!(reason(&left, 1).starts_with("no answer from the provider: "), "{}", reason(&left, 1));

        let silent = provider(|_, _| std::future::pending::<String>()).await;
        let limits = super::super::client::Limits { deadline: std::time::Duration::from_millis(50), retries: 2 };
        let client = ChatClient::new(&silent.url, None, limits).unwrap();
        assert_eq!(client.complete(&json!({})).await.unwrap_err(), "no answer within 50ms");
    }

    #[tokio::test]
    async fn the_form_of_the_answer_is_told_as_the_provider_takes_it() {
        for (word, expected) in [("json_object_schema", json!("integer")), ("json_object", Value::Null)] {
            let provider = provider(|_, _| async { response("200 OK", "", "{}") }).await;
            answered(&*operator(&provider.url, &format!(r#","response_format":"{word}""#)), rows(0..1)).await;
            let format = &provider.requests.lock().unwrap()[0].1["response_format"];
            assert_eq!(format["type"], "json_object");
            assert_eq!(format["schema"]["properties"]["urgency"]["type"], expected, "{word}");
        }
    }

    #[tokio::test]
    async fn an_answer_that_is_not_whole_is_no_answer() {
        let provider = provider(|_, body| async move {
            let message = match number_in(&body) {
                0 => json!({ "choices": [{ "message": { "content": "{\"summary\":\"a\",\"urgency\":1}" }, "finish_reason": "length" }] }),
                1 => json!({ "choices": [{ "message": { "content": null, "refusal": "I will not" } }] }),
                2 => json!({ "choices": [] }),
                3 => json!({ "choices": [{ "message": { "content": "x".repeat(2 << 20) } }] }),
                _ => json!({ "error": "moved" }),
            };
            response("200 OK", "", &message.to_string())
        })
        .await;
        let left = answered(&*operator(&provider.url, r#","response_format":"none""#), rows(0..5)).await;
        assert_eq!(urgencies(&left), [None; 5]);
        let reasons: Vec<&str> = (0..5).map(|row| reason(&left, row)).collect();
        assert_eq!(reasons[0], "the answer was cut off at max_tokens");
        assert_eq!(reasons[1], "the model refuses: \"I will not\"");
        assert_eq!(reasons[2], "the provider's answer has no choices");
        assert_eq!(reasons[3], "the provider's answer is over 1048576 bytes");
        assert!(reasons[4].starts_with("the provider's answer is no chat completion: "), "{}", reasons[4]);
        assert!(provider.requests.lock().unwrap()[0].1.get("response_format").is_none());
    }
}
