//! SQL in a stream: the `sql` operator and the boolean expressions of `route`, planned once by DataFusion and
//! evaluated row by row. The invariant: what is not row-wise is refused while planning, with its place in the text.

mod expression;
mod place;
mod refusal;
mod select;

pub(crate) use expression::{Condition, problems, session, sift};
pub use select::SqlConfig;
