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

    /// Whether all components are ready.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.lock().iter().all(|component| component.reason.is_none())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Component>> {
        self.components.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
        let ready = components.iter().all(|component| component.reason.is_none());
        f.write_str(if ready { "ready\n" } else { "not ready\n" })
    }
}

impl Handle {
    /// It works. A change is logged.
    pub fn ready(&self) {
        if self.replace(None) {
            tracing::info!(component = self.name(), "ready");
        }
    }

    /// It does not, and why: a short text without secrets. The first change is logged; later reasons only show in
    /// `/readyz`.
    pub fn not_ready(&self, reason: impl Into<String>) {
        let reason = reason.into();
        if self.replace(Some(reason.clone())) {
            tracing::warn!(component = self.name(), reason, "not ready");
        }
    }

    /// Whether ready has become not ready, or the other way round.
    fn replace(&self, reason: Option<String>) -> bool {
        let mut components = self.readiness.lock();
        let Some(component) = components.get_mut(self.index) else {
            return false;
        };
        let changed =
            component.reason.is_some() != reason.is_some() || component.reason.as_deref() == Some("starting");
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
