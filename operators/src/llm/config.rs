//! What an author writes for `llm`, and its planning: the template is read and its variables are bound to columns, and
//! the schema that leaves is fixed. Nobody is called before the stage runs.

use std::fmt;
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;
use std::time::Duration;

use afferent_engine::component::{
    BuildContext, Input, OperatorBuild, OperatorConfig, OperatorPlan, Output, PlanContext, Planned, Problem,
};
use afferent_engine::config::{Interval, Secret, resolve};
use afferent_engine::operator::AsyncOperator;
use afferent_engine::{Error, Result};
use afferent_formats::Declaration;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use schemars::{JsonSchema, Schema as JsonSchemaText, SchemaGenerator, json_schema};
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::answer::Answer;
use super::client::{ChatClient, Limits};
use super::operator::{Llm, Question};
use super::prompt::Prompt;
use crate::columns;

/// Asks a language model about each row and adds its answer as columns. Speaks to any endpoint of the OpenAI wire
/// format, one request a row; rows leave in the order in which they came.
///
/// The columns of `output` are added behind those that arrive, and the error column behind them. It is null where all
/// went well. Where not, the columns of `output` are null and it says why: no answer within the deadline, a refusal, an
/// answer that is not of the declared form. A provider that is down therefore never stops the stream.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub struct LlmConfig {
    /// Base address of the provider, such as `https://api.openai.com/v1`; `/chat/completions` is added to it.
    pub url: String,
    /// Name of the model at the provider.
    pub model: String,
    /// Key for the provider, sent as a bearer token. Without it none is sent.
    #[serde(default)]
    pub api_key: Option<Secret>,
    /// The question: a template file (its path as seen from the pipeline file), or `{ template: TEXT }`. Columns are
    /// its variables, `{{ column }}`, in the syntax of Jinja; timestamps are ISO 8601 text, a null is `none`.
    pub prompt: PromptSource,
    /// A text that goes ahead of every question, as the system's message.
    #[serde(default)]
    pub system: Option<String>,
    /// The columns that the answer must have, with their types: a JSON object with these keys. A column that may be
    /// null takes an explicit null too; a missing key is an error.
    pub output: Declaration,
    /// How the provider is told the form of the answer.
    #[serde(default)]
    pub response_format: ResponseFormat,
    /// How freely words are chosen: 0 takes the likeliest each time.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub temperature: f64,
    /// Tokens that an answer has at most; a longer one is cut off by the provider and is an error.
    #[serde(default = "default_max_tokens")]
    pub max_tokens: NonZeroU32,
    /// How long one row may take with all its attempts, counted from the first; at most a day.
    #[serde(default = "default_deadline")]
    pub deadline: Interval,
    /// Further attempts at a row after an overloaded or unreachable provider (status 408, 429, 5xx; a Retry-After is
    /// kept to). Other refusals are final.
    #[serde(default = "default_retries")]
    pub retries: u32,
    /// Requests under way at once.
    #[serde(default = "default_concurrency")]
    pub concurrency: NonZeroUsize,
    /// Name of the column that says what went wrong (utf8).
    #[serde(default = "default_error_column")]
    pub error_column: String,
}

/// Where the template of the question is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PromptSource {
    /// In a file: its path.
    File(String),
    /// In the configuration: the text.
    Template(String),
}

/// How the provider is told the form of the answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ResponseFormat {
    /// By a JSON Schema, made of `output`, that the provider enforces.
    #[default]
    JsonSchema,
    /// As a JSON object with that schema beside it, as llama.cpp and its Python server take it.
    JsonObjectSchema,
    /// As any JSON object; the prompt must say which.
    JsonObject,
    /// Not at all; the prompt must say it.
    None,
}

const fn default_max_tokens() -> NonZeroU32 {
    match NonZeroU32::new(256) {
        Some(tokens) => tokens,
        None => NonZeroU32::MIN,
    }
}

fn default_deadline() -> Interval {
    Interval::secs(30)
}

fn default_retries() -> u32 {
    2
}

const fn default_concurrency() -> NonZeroUsize {
    match NonZeroUsize::new(4) {
        Some(requests) => requests,
        None => NonZeroUsize::MIN,
    }
}

fn default_error_column() -> String {
    "llm_error".to_owned()
}

impl<'de> Deserialize<'de> for PromptSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Source;
        impl<'de> Visitor<'de> for Source {
            type Value = PromptSource;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the path of a template file, or { template: TEXT }")
            }

            fn visit_str<E: de::Error>(self, path: &str) -> std::result::Result<PromptSource, E> {
                Ok(PromptSource::File(path.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<PromptSource, A::Error> {
                let mut template = None;
                while let Some(key) = map.next_key::<String>()? {
                    if key != "template" {
                        return Err(de::Error::unknown_field(&key, &["template"]));
                    }
                    if template.replace(map.next_value::<String>()?).is_some() {
                        return Err(de::Error::duplicate_field("template"));
                    }
                }
                template.map(PromptSource::Template).ok_or_else(|| de::Error::missing_field("template"))
            }
        }
        deserializer.deserialize_any(Source)
    }
}

impl JsonSchema for PromptSource {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "PromptSource".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> JsonSchemaText {
        json_schema!({
            "description": "The path of a template file, or the template itself as `{ template: TEXT }`.",
            "anyOf": [
                { "type": "string" },
                {
                    "type": "object",
                    "properties": { "template": { "type": "string" } },
                    "required": ["template"],
                    "additionalProperties": false
                }
            ]
        })
    }
}

impl OperatorConfig for LlmConfig {
    const NAME: &'static str = "llm";
    const EXAMPLE: &'static str = "llm: { url: \"http://127.0.0.1:8080/v1\", model: smollm2, \
        prompt: { template: \"Sensor {{ device }} reads {{ value }}. Summarise it and say how urgent it is, 0 to 9.\" }, \
        output: { summary: utf8, urgency: int8 } }";

    fn check(&self, context: &PlanContext) -> Vec<Problem> {
        let mut problems = self.bad_values();
        let template = self.template(context).and_then(|(name, text)| Prompt::check(&name, text));
        problems.extend(template.err().into_iter().flatten());
        if let Err(error) = Answer::new(&self.output) {
            problems.push(Problem::new("unsupported-type", "/output", error.to_string()));
        }
        problems
    }

    fn declares(&self, inputs: &[Input]) -> Option<Vec<Output>> {
        let [input] = inputs else { return None };
        let mut problems = Vec::new();
        let schema = self.schema(&input.schema, &mut problems);
        problems.is_empty().then(|| vec![Output { name: String::new(), schema }])
    }

    fn plan(self, inputs: &[Input], context: &PlanContext) -> Planned<OperatorPlan> {
        let input = &columns::only(inputs, Self::NAME)?.schema;
        let mut problems = self.bad_values();
        let prompt = match self.template(context).and_then(|(name, text)| Prompt::new(&name, text, input)) {
            Ok(prompt) => Some(prompt),
            Err(found) => {
                problems.extend(found);
                None
            }
        };
        let answer = match Answer::new(&self.output) {
            Ok(answer) => Some(answer),
            Err(error) => {
                problems.push(Problem::new("unsupported-type", "/output", error.to_string()));
                None
            }
        };
        let schema = self.schema(input, &mut problems);
        let (Some(prompt), Some(answer), true) = (prompt, answer, problems.is_empty()) else {
            return Err(problems);
        };
        let question = Question::new(&self, answer.json_schema(&self.output));
        let parts = Arc::new((self, prompt, answer, question));
        let built = Arc::clone(&schema);
        let build = move |context: &BuildContext| -> Result<Arc<dyn AsyncOperator>> {
            let client = parts.0.client()?;
            let (config, prompt, answer, question) = &*parts;
            let stage = context.stage.clone();
            Ok(Arc::new(Llm::new(
                stage,
                client,
                prompt.clone(),
                answer.clone(),
                question.clone(),
                Arc::clone(&built),
                config.concurrency,
            )))
        };
        Ok(OperatorPlan { outputs: vec![Output { name: String::new(), schema }], build: OperatorBuild::Async(Arc::new(build)) })
    }
}

impl LlmConfig {
    /// What serde cannot tell.
    fn bad_values(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        // An address with references is not known before the stage is built.
        if !self.url.contains("${")
            && let Err(error) = ChatClient::endpoint(&self.url)
        {
            problems.push(
                Problem::new("bad-value", "/url", format!("`{}` is not an address of a provider: {error}", self.url))
                    .help("write for example http://127.0.0.1:8080/v1"),
            );
        }
        if self.deadline.0.is_zero() || self.deadline.0 > Duration::from_secs(86_400) {
            let message = format!("a deadline of {} is none", self.deadline);
            problems.push(Problem::new("bad-value", "/deadline", message).help("write more than nothing and at most 24h"));
        }
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            let message = format!("{} is not a temperature", self.temperature);
            problems.push(Problem::new("bad-value", "/temperature", message).help("write 0 or more"));
        }
        problems
    }

    /// Name and text of the template.
    fn template(&self, context: &PlanContext) -> Planned<(String, String)> {
        match &self.prompt {
            PromptSource::Template(text) => Ok(("prompt".to_owned(), text.clone())),
            PromptSource::File(path) => {
                let found = context.path(path);
                let text = std::fs::read_to_string(&found).map_err(|error| {
                    let message = format!("the prompt `{}` cannot be read: {error}", found.display());
                    vec![Problem::new("missing-file", "/prompt", message).help(
                        "a path starts at the folder of the pipeline file; for a text in its place write { template: TEXT }",
                    )]
                })?;
                Ok((path.clone(), text))
            }
        }
    }

    /// What leaves: the input, the answer's columns, the error column.
    fn schema(&self, input: &Schema, problems: &mut Vec<Problem>) -> SchemaRef {
        let mut fields: Vec<Field> = input.fields().iter().map(|field| field.as_ref().clone()).collect();
        let of_answer = self.output.to_arrow();
        let added = of_answer.fields().iter().map(|field| (field.as_ref().clone().with_nullable(true), "/output"));
        let error = (Field::new(&self.error_column, DataType::Utf8, true), "/error_column");
        for (field, place) in added.chain(std::iter::once(error)) {
            if fields.iter().any(|known| known.name() == field.name()) {
                problems.push(
                    Problem::new("duplicate-column", place, format!("there would be two columns `{}`", field.name()))
                        .help("give it another name, or leave the other out with `sql` first"),
                );
            }
            fields.push(field);
        }
        Arc::new(Schema::new(fields))
    }

    fn client(&self) -> Result<ChatClient> {
        let url = resolve(&self.url).map_err(Error::fatal)?;
        let key = self
            .api_key
            .as_ref()
            .map(Secret::reveal)
            .transpose()
            .map_err(|error| Error::fatal(error).context("reading the api_key"))?;
        ChatClient::new(&url, key, Limits { deadline: self.deadline.0, retries: self.retries })
            .map_err(|error| Error::fatal(error).context(format!("setting up requests to {url}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readings() -> SchemaRef {
        Arc::new(Schema::new(vec![Field::new("device", DataType::Utf8, false), Field::new("value", DataType::Float64, true)]))
    }

    fn plan(text: &str) -> Planned<OperatorPlan> {
        plan_in(text, &PlanContext::default())
    }

    fn plan_in(text: &str, context: &PlanContext) -> Planned<OperatorPlan> {
        let config: LlmConfig = serde_json::from_str(text).unwrap();
        config.plan(&[Input { name: "readings".into(), schema: readings() }], context)
    }

    fn with(rest: &str) -> String {
        format!(r#"{{"url":"http://127.0.0.1:1/v1","model":"m","output":{{"summary":"utf8!","urgency":"int8"}},{rest}}}"#)
    }

    #[test]
    fn what_needs_no_columns_is_checked_without_inputs() {
        let text = with(r#""prompt":{"template":"{{ nothing"}"#).replace("http://127.0.0.1:1/v1", "nourl");
        let config: LlmConfig = serde_json::from_str(&text).unwrap();
        let found = config.check(&PlanContext::default());
        assert_eq!(found.iter().map(|p| p.path.as_str()).collect::<Vec<_>>(), ["/url", "/prompt"]);
        // What leaves is known all the same.
        let declared = config.declares(&[Input { name: "readings".into(), schema: readings() }]).unwrap();
        assert_eq!(declared[0].schema.field(readings().fields().len()).name(), "summary");
    }

    #[test]
    fn the_answer_and_the_error_stand_behind_the_input() {
        let plan = plan(&with(r#""prompt":{"template":"{{ device }}"}"#)).unwrap();
        let schema = &plan.outputs[0].schema;
        let columns: Vec<(&str, bool)> =
            schema.fields().iter().map(|field| (field.name().as_str(), field.is_nullable())).collect();
        assert_eq!(columns, [("device", false), ("value", true), ("summary", true), ("urgency", true), ("llm_error", true)]);
        assert!(matches!(plan.build, OperatorBuild::Async(_)));
    }

    #[test]
    fn every_problem_is_told_at_once() {
        let text = with(r#""prompt":{"template":"{{ devise }}"},"error_column":"value","deadline":"0s","temperature":-1"#);
        let found = plan(&text.replace("http:", "ftp:")).err().unwrap();
        let told: Vec<(&str, &str)> = found.iter().map(|problem| (problem.code, problem.path.as_str())).collect();
        let expected = [
            ("bad-value", "/url"),
            ("bad-value", "/deadline"),
            ("bad-value", "/temperature"),
            ("unknown-column", "/prompt"),
            ("duplicate-column", "/error_column"),
        ];
        assert_eq!(told, expected);
    }

    #[test]
    fn a_template_file_is_read_from_beside_the_pipeline() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("note.txt"), "{{ device }} at {{ value }}").unwrap();
        let context = PlanContext { base: folder.path().to_owned(), ..PlanContext::default() };
        assert!(plan_in(&with(r#""prompt":"note.txt""#), &context).is_ok());
        let missing = plan_in(&with(r#""prompt":"note.md""#), &context).err().unwrap();
        assert_eq!((missing[0].code, missing[0].path.as_str()), ("missing-file", "/prompt"));
        assert!(missing[0].message.contains("note.md"), "{}", missing[0].message);
    }

    #[test]
    fn a_prompt_is_a_path_or_a_template_and_nothing_else() {
        let read = serde_json::from_str::<PromptSource>;
        assert_eq!(read(r#""a.txt""#).unwrap(), PromptSource::File("a.txt".into()));
        assert_eq!(read(r#"{"template":"x"}"#).unwrap(), PromptSource::Template("x".into()));
        assert!(read(r#"{"templat":"x"}"#).unwrap_err().to_string().contains("expected `template`"));
        assert!(read("{}").is_err() && read("7").is_err());
    }
}
