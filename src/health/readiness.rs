//! Which parts of the process can work. Each part holds a [`Handle`] and says so itself.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// All components of a process; ready when every one is. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    components: Arc<Mutex<Vec<Component>>>,
}

#[derive(Debug)]
struct Component {
    name: &'static str,
    /// Why not; `None` when ready.
    reason: Option<String>,
}

/// One component's own switch.
#[derive(Debug, Clone)]
pub struct Handle {
    readiness: Readiness,
    index: usize,
}

impl Readiness {
    /// Registers a component. It is not ready until it says so.
    #[must_use]
    pub fn component(&self, name: &'static str) -> Handle {
        let mut components = self.lock();
        components.push(Component {
            name,
            reason: Some("starting".into()),
        });
        Handle {
            readiness: self.clone(),
            index: components.len() - 1,
        }
    }

    /// Whether all components are ready. Not before there are any: who asks while a process begins must not be told that
    /// it can work.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        all_ready(&self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Component>> {
        self.components.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn all_ready(components: &[Component]) -> bool {
    !components.is_empty() && components.iter().all(|component| component.reason.is_none())
}

/// One line per component and one for all, as Kubernetes' own servers answer.
impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let components = self.lock();
        for component in components.iter() {
            match &component.reason {
                None => writeln!(f, "[+] {} ok", component.name)?,
                Some(reason) => writeln!(f, "[-] {}: {reason}", component.name)?,
            }
        }
        f.write_str(if all_ready(&components) {
            "ready\n"
        } else {
            "not ready\n"
        })
    }
}

impl Handle {
    /// It works. A change is logged.
    pub fn ready(&self) {
        if self.replace(None) {
            tracing::info!(component = self.name(), "ready");
        }
    }

    /// It does not, and why: a short text without secrets. A new reason is logged, the same one again is not.
    pub fn not_ready(&self, reason: impl Into<String>) {
        let reason = reason.into();
        if self.replace(Some(reason.clone())) {
            tracing::warn!(component = self.name(), reason, "not ready");
        }
    }

    /// Whether the state or its reason is another than before.
    fn replace(&self, reason: Option<String>) -> bool {
        let mut components = self.readiness.lock();
        let Some(component) = components.get_mut(self.index) else {
            return false;
        };
        let changed = component.reason != reason;
        component.reason = reason;
        changed
    }

    fn name(&self) -> &'static str {
        self.readiness
            .lock()
            .get(self.index)
            .map_or("", |component| component.name)
    }
}
