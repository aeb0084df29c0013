//! Which execution provider each node of a session was given: what executes, and not what was
//! asked for.
//!
//! ONNX Runtime records it while it builds a session ([`RECORD`]) and tells it through its C
//! interface (`Session_GetEpGraphAssignmentInfo`, from release 1.24 on), for which `ort` has no safe
//! call yet. All unsafe code of the crate is here.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::ptr;

use ort::AsPointer;
use ort::session::Session;
use ort::sys::{OrtEpAssignedNode, OrtEpAssignedSubgraph, OrtStatusPtr};

use angler_wire::error::Reason;

/// The configuration entry of a session, to be "1", without which nothing is recorded.
pub(super) const RECORD: &str = "session.record_ep_graph_assignment_info";

/// Operators that compute shapes, which ONNX Runtime puts on the CPU on purpose, where the sizes are.
/// Any other that a GPU leaves to the CPU moves activations there and back, and is refused: which
/// operators a provider lacks is not known beforehand (of an int8 model it may be all).
const SHAPES: [&str; 32] = [
    "Add",
    "And",
    "Cast",
    "Ceil",
    "Concat",
    "Constant",
    "ConstantOfShape",
    "Div",
    "Equal",
    "Expand",
    "Floor",
    "Gather",
    "Greater",
    "Identity",
    "Less",
    "Max",
    "Min",
    "Mod",
    "Mul",
    "Neg",
    "Not",
    "Or",
    "Range",
    "ReduceProd",
    "Reshape",
    "Shape",
    "Size",
    "Slice",
    "Squeeze",
    "Sub",
    "Unsqueeze",
    "Where",
];

/// The nodes of a session by provider, each with how many there are of each operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Assignment(BTreeMap<String, BTreeMap<String, usize>>);

impl Assignment {
    /// Reads it.
    ///
    /// # Errors
    /// If ONNX Runtime tells nothing.
    pub fn of(session: &Session) -> Result<Self, Reason> {
        let api = ort::api();
        let (mut subgraphs, mut count) = (ptr::null(), 0);
        // SAFETY: the session is alive, and owns what it lends here for as long as it lives.
        let subgraphs: &[*const OrtEpAssignedSubgraph] = unsafe {
            check_status((api.Session_GetEpGraphAssignmentInfo)(
                session.ptr(),
                &mut subgraphs,
                &mut count,
            ))?;
            borrowed(subgraphs, count)
        };
        let mut providers: BTreeMap<String, BTreeMap<String, usize>> = BTreeMap::new();
        for subgraph in subgraphs {
            let (mut name, mut nodes, mut count) = (ptr::null(), ptr::null(), 0);
            // SAFETY: the pointer is one of the session's own, and what is read from it, too.
            let (name, nodes): (String, &[*const OrtEpAssignedNode]) = unsafe {
                check_status((api.EpAssignedSubgraph_GetEpName)(*subgraph, &mut name))?;
                check_status((api.EpAssignedSubgraph_GetNodes)(*subgraph, &mut nodes, &mut count))?;
                (text(name), borrowed(nodes, count))
            };
            let operators = providers.entry(name).or_default();
            for node in nodes {
                let mut operator = ptr::null();
                // SAFETY: as above.
                let operator = unsafe {
                    check_status((api.EpAssignedNode_GetOperatorType)(*node, &mut operator))?;
                    text(operator)
                };
                *operators.entry(operator).or_default() += 1;
            }
        }
        match providers.is_empty() {
            true => Err("ONNX Runtime does not say which provider executes".into()),
            false => Ok(Self(providers)),
        }
    }

    /// Checks that this provider has nodes, and that the CPU has none but those that compute shapes.
    ///
    /// # Errors
    /// What the CPU would have to execute.
    pub fn check(&self, provider: &str) -> Result<(), Reason> {
        let on_the_cpu = self.0.get(CPU).into_iter().flatten();
        let computed: Vec<String> = on_the_cpu
            .filter(|(operator, _)| !SHAPES.contains(&operator.as_str()))
            .map(|(operator, nodes)| format!("{nodes} {operator}"))
            .collect();
        if provider != CPU && !computed.is_empty() {
            let computed = computed.join(", ");
            let reason = format!("{provider} leaves nodes of the model to the CPU: {computed}");
            return Err(reason.into());
        }
        match self.0.contains_key(provider) {
            true => Ok(()),
            false => Err(format!("{provider} executes nothing: {self}").into()),
        }
    }
}

impl std::fmt::Display for Assignment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (at, (provider, operators)) in self.0.iter().enumerate() {
            let nodes: usize = operators.values().sum();
            let and = if at == 0 { "" } else { ", " };
            write!(f, "{and}{nodes} nodes on {provider}")?;
        }
        Ok(())
    }
}

const CPU: &str = "CPUExecutionProvider";

/// The error that a status stands for.
///
/// # Safety
/// The status is ONNX Runtime's and was not released.
unsafe fn check_status(status: OrtStatusPtr) -> Result<(), Reason> {
    if status.0.is_null() {
        return Ok(());
    }
    let api = ort::api();
    // SAFETY: by contract; it is released once, after its message was copied.
    unsafe {
        let message = text((api.GetErrorMessage)(status.0));
        (api.ReleaseStatus)(status.0);
        Err(message.into())
    }
}

/// # Safety
/// `first` is null or begins `count` elements that outlive the borrow.
unsafe fn borrowed<'a, T>(first: *const T, count: usize) -> &'a [T] {
    if first.is_null() || count == 0 {
        return &[];
    }
    // SAFETY: by contract.
    unsafe { std::slice::from_raw_parts(first, count) }
}

/// # Safety
/// `text` is null or ends with a zero byte.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: by contract.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assignment(nodes: &[(&str, &str, usize)]) -> Assignment {
        let mut providers: BTreeMap<String, BTreeMap<String, usize>> = BTreeMap::new();
        for (provider, operator, count) in nodes {
            let operators = providers.entry((*provider).to_owned()).or_default();
            operators.insert((*operator).to_owned(), *count);
        }
        Assignment(providers)
    }

    const CUDA: &str = "CUDAExecutionProvider";

    #[test]
    fn a_gpu_that_leaves_only_shapes_to_the_cpu_is_a_gpu() {
        let found = assignment(&[(CUDA, "Conv", 50), (CUDA, "Add", 9), (CPU, "Shape", 2)]);
        found.check(CUDA).unwrap();
        assert_eq!(
            found.to_string(),
            "2 nodes on CPUExecutionProvider, 59 nodes on CUDAExecutionProvider"
        );
    }

    #[test]
    fn what_computes_on_the_cpu_is_named() {
        let found = assignment(&[(CUDA, "Conv", 50), (CPU, "Gemm", 1), (CPU, "TopK", 1)]);
        let reason = found.check(CUDA).unwrap_err().to_string();
        let wanted = "CUDAExecutionProvider leaves nodes of the model to the CPU: 1 Gemm, 1 TopK";
        assert_eq!(reason, wanted);
        let int8 = [(CUDA, "Conv", 50), (CPU, "QuantizeLinear", 90), (CPU, "Gather", 1)];
        let reason = assignment(&int8).check(CUDA).unwrap_err().to_string();
        assert!(reason.ends_with("to the CPU: 90 QuantizeLinear"), "{reason}");
        let found = assignment(&[(CPU, "Shape", 2)]);
        let reason = found.check(CUDA).unwrap_err().to_string();
        assert!(reason.starts_with("CUDAExecutionProvider executes nothing"), "{reason}");
        assignment(&[(CPU, "Conv", 2)]).check(CPU).unwrap();
    }
}
